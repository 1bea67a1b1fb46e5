"""Gated activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from colossal_core.testing.op_cases.case import Cases, Normal, OpCase


def _swiglu(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, shape in (("matrix", (5, 12)), ("odd width", (2, 3, 7)), ("empty", (0, 8))):
        yield OpCase(name, (normal(*shape), normal(*shape)))
    yield OpCase("not contiguous", (normal(12, 5).t(), normal(12, 5).t()))


CASES: Mapping[str, Cases] = {"swiglu": _swiglu}
