"""Gated activations, of two tensors and of one that holds both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from colossal_core.testing.op_cases.case import Cases, Normal, OpCase

SHAPES = (("matrix", (5, 12)), ("odd width", (2, 3, 7)), ("one", (1, 1)), ("empty", (0, 8)))


def _two(normal: Normal) -> Iterator[OpCase]:
    for name, shape in SHAPES:
        yield OpCase(name, (normal(*shape), normal(*shape)))
    yield OpCase("not contiguous", (normal(12, 5).t(), normal(12, 5).t()))
    both = normal(3, 14)
    yield OpCase("halves of one", (both[:, :7], both[:, 7:]))
    yield OpCase("weighted", (normal(2, 3, 7), normal(2, 3, 7)), {"weights": normal(2, 3)})


def _swiglu(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    yield from _two(normal)


def _geglu(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    yield from _two(normal)
    yield OpCase("tanh", (normal(4, 9), normal(4, 9)), {"approximate": "tanh"})


def _packed(normal: Normal) -> Iterator[OpCase]:
    for name, shape in SHAPES:
        yield OpCase(name, (normal(*shape[:-1], 2 * shape[-1]),))
        yield OpCase(f"{name}, interleaved", (normal(*shape[:-1], 2 * shape[-1]),), {"interleaved": True})
    yield OpCase("columns before rows", (normal(12, 5).t(),))
    for interleaved in (False, True):
        keywords: dict[str, Any] = {"weights": normal(2, 3), "interleaved": interleaved}
        yield OpCase(f"weighted {interleaved}", (normal(2, 3, 10),), keywords)


def _packed_swiglu(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    yield from _packed(normal)
    shape = {"interleaved": True, "alpha": 1.702, "limit": 0.7, "shift": 1.0}
    yield OpCase("clamped", (normal(6, 10),), shape)
    yield OpCase("clamped and weighted", (normal(6, 10),), {**shape, "interleaved": False, "weights": normal(6)})


def _packed_geglu(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    yield from _packed(normal)
    yield OpCase("tanh", (normal(4, 18),), {"approximate": "tanh"})


CASES: Mapping[str, Cases] = {
    "swiglu": _swiglu,
    "geglu": _geglu,
    "packed_swiglu": _packed_swiglu,
    "packed_geglu": _packed_geglu,
}
