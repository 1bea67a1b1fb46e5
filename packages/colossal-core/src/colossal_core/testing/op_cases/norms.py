"""Normalisations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from colossal_core.testing.op_cases.case import Cases, Normal, OpCase

SHAPES = (
    ("matrix", (5, 12)),
    ("odd width", (2, 3, 7)),
    ("one row", (1, 16)),
    ("one feature", (3, 1)),
    ("many narrow rows", (37, 4)),
    ("empty", (0, 8)),
)


def _rms_norm(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, shape in SHAPES:
        yield OpCase(name, (normal(*shape), normal(shape[-1]), 1e-6))
    yield OpCase("no weight", (normal(4, 10), None, 1e-5))
    yield OpCase("offset", (normal(4, 10), normal(10), 1e-5), {"offset": 1.0})
    yield OpCase("heads before tokens", (normal(2, 5, 3, 8).transpose(1, 2), normal(8), 1e-6))
    yield OpCase("every second row", (normal(6, 3, 8)[::2], normal(8), 1e-6))
    yield OpCase("columns before rows", (normal(8, 5).t(), normal(8), 1e-6))


def _layer_norm(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, shape in SHAPES:
        yield OpCase(name, (normal(*shape), normal(shape[-1]), normal(shape[-1]), 1e-5))
    yield OpCase("no bias", (normal(4, 10), normal(10), None, 1e-5))
    yield OpCase("no weight", (normal(4, 10), None, normal(10), 1e-5))
    yield OpCase("neither", (normal(4, 10), None, None, 1e-5))
    yield OpCase("offset", (normal(4, 10), normal(10), normal(10), 1e-5), {"offset": 1.0})
    yield OpCase("heads before tokens", (normal(2, 5, 3, 8).transpose(1, 2), normal(8), normal(8), 1e-6))


def _add_rms_norm(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, shape in SHAPES:
        yield OpCase(name, (normal(*shape), normal(*shape), normal(shape[-1]), 1e-6))
    yield OpCase("no weight", (normal(4, 10), normal(4, 10), None, 1e-5))
    yield OpCase("offset", (normal(4, 10), normal(4, 10), normal(10), 1e-5), {"offset": 1.0})
    yield OpCase("two layouts", (normal(2, 5, 3, 8).transpose(1, 2), normal(2, 3, 5, 8), normal(8), 1e-6))


def _add_layer_norm(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, shape in SHAPES:
        yield OpCase(name, (normal(*shape), normal(*shape), normal(shape[-1]), normal(shape[-1]), 1e-5))
    yield OpCase("no bias", (normal(4, 10), normal(4, 10), normal(10), None, 1e-5))
    yield OpCase("neither", (normal(4, 10), normal(4, 10), None, None, 1e-5))
    yield OpCase("offset", (normal(4, 10), normal(4, 10), normal(10), None, 1e-5), {"offset": 1.0})


def _rms_norm_fp8(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, shape in SHAPES:
        yield OpCase(name, (normal(*shape), normal(shape[-1]), 1e-6))
    yield OpCase("no weight", (normal(4, 10), None, 1e-5))
    yield OpCase("offset", (normal(4, 10), normal(10), 1e-5), {"offset": 1.0})
    x = normal(3, 8)
    yield OpCase("a row of zeros", (x.masked_fill(torch.tensor([[False], [True], [False]]), 0.0), normal(8), 1e-6))


CASES: Mapping[str, Cases] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "add_rms_norm": _add_rms_norm,
    "add_layer_norm": _add_layer_norm,
    "rms_norm_fp8": _rms_norm_fp8,
}
