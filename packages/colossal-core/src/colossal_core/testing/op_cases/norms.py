"""Normalisations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from colossal_core.testing.op_cases.case import Cases, Normal, OpCase


def _rms_norm(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, shape in (("matrix", (5, 12)), ("odd width", (2, 3, 7)), ("one row", (1, 16)), ("empty", (0, 8))):
        yield OpCase(name, (normal(*shape), normal(shape[-1]), 1e-6))
    yield OpCase("no weight", (normal(4, 10), None, 1e-5))


def _layer_norm(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, shape in (("matrix", (5, 12)), ("odd width", (2, 3, 7)), ("empty", (0, 8))):
        yield OpCase(name, (normal(*shape), normal(shape[-1]), normal(shape[-1]), 1e-5))
    yield OpCase("no bias", (normal(4, 10), normal(10), None, 1e-5))
    yield OpCase("neither", (normal(4, 10), None, None, 1e-5))


CASES: Mapping[str, Cases] = {"rms_norm": _rms_norm, "layer_norm": _layer_norm}
