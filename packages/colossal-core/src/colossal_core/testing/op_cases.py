"""Inputs of each op for `OpSuite`: ordinary and odd shapes, empty ones, and every optional argument, in any floating dtype.

Letters: B sequences, H query heads, K key-value heads, L queries, S keys, D features, V vocabulary, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from colossal_core.ops.adamw import AdamWSettings


@dataclass(frozen=True)
class OpCase:
    """One call. arguments: as the op takes them; floating tensors among them are differentiated, except where `in_place`.

    in_place: the op returns nothing and changes its arguments: those are compared.
    """

    name: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    in_place: bool = False


def op_cases(op: str, dtype: torch.dtype) -> tuple[OpCase, ...]:
    """The cases of an op, the same numbers each time (rounded to `dtype`)."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return tuple(_CASES[op](normal, generator))


Normal = Callable[..., torch.Tensor]


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


def _rotary(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, queries, keys, width in (("grouped", 4, 2, 8), ("partly turned", 3, 3, 4)):
        angles = normal(1, 5, width // 2)
        both = torch.cat([angles, angles], dim=-1)
        yield OpCase(name, (normal(2, queries, 5, 8), normal(2, keys, 5, 8), both.cos().detach(), both.sin().detach()))
    yield OpCase("empty", (normal(0, 2, 3, 4), normal(0, 2, 3, 4), normal(1, 3, 4), normal(1, 3, 4)))


def _swiglu(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, shape in (("matrix", (5, 12)), ("odd width", (2, 3, 7)), ("empty", (0, 8))):
        yield OpCase(name, (normal(*shape), normal(*shape)))
    yield OpCase("not contiguous", (normal(12, 5).t(), normal(12, 5).t()))


def _attention(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    plain = (normal(2, 2, 5, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 8))
    yield OpCase("whole", plain)
    yield OpCase("causal", plain, {"causal": True})
    yield OpCase("grouped queries", (normal(1, 4, 5, 8), normal(1, 2, 5, 8), normal(1, 2, 5, 8)), {"causal": True})
    yield OpCase(
        "fewer queries than keys", (normal(1, 2, 3, 8), normal(1, 2, 7, 8), normal(1, 2, 7, 8)), {"causal": True}
    )
    mask = torch.rand(2, 1, 5, 5, generator=generator) < 0.7
    mask[..., 0] = True
    yield OpCase("mask and scaling", (*plain, mask), {"scaling": 0.3})


def _labels(generator: torch.Generator, size: int, vocabulary: int) -> torch.Tensor:
    labels = torch.randint(vocabulary, (size,), generator=generator)
    return labels.masked_fill(torch.arange(size) % 3 == 1, -100)


def _cross_entropy(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    yield OpCase("rows", (normal(7, 11), _labels(generator, 7, 11)))
    yield OpCase("sequences", (normal(2, 5, 13), _labels(generator, 10, 13).view(2, 5)))
    yield OpCase("nothing counts", (normal(3, 5), torch.full((3,), -100)))
    yield OpCase("empty", (normal(0, 5), torch.zeros(0, dtype=torch.long)))
    yield OpCase("logits stay", (normal(4, 9), _labels(generator, 4, 9)), {"overwrite": False})


def _linear_cross_entropy(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    yield OpCase("chunks", (normal(7, 6), normal(11, 6), _labels(generator, 7, 11)), {"chunk": 3})
    yield OpCase("bias", (normal(2, 4, 6), normal(9, 6), _labels(generator, 8, 9).view(2, 4), normal(9)))
    yield OpCase("nothing counts", (normal(3, 6), normal(5, 6), torch.full((3,), -100)))


def _adamw_step(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    settings = AdamWSettings(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)

    def state(*shapes: tuple[int, ...]) -> tuple[list[torch.Tensor], ...]:
        lists = tuple([normal(*shape) for shape in shapes] for _ in range(4))
        return (*lists[:3], [tensor.square() for tensor in lists[3]])

    step = torch.tensor(3.0)
    shapes = ((3, 5), (7,), ())
    yield OpCase("mixed shapes", state(*shapes), {"settings": settings, "step": step}, in_place=True)
    clip = torch.tensor(0.25)
    yield OpCase("clipped", state(*shapes), {"settings": settings, "step": step, "clip": clip}, in_place=True)
    skip = torch.tensor(True)
    yield OpCase("skipped", state(*shapes), {"settings": settings, "step": step, "skip": skip}, in_place=True)
    yield OpCase("empty shard", state((0,), (4,)), {"settings": settings, "step": step}, in_place=True)
    yield OpCase("no parameters", state(), {"settings": settings, "step": step}, in_place=True)


_CASES: Mapping[str, Callable[[Normal, torch.Generator], Iterator[OpCase]]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rotary": _rotary,
    "swiglu": _swiglu,
    "attention": _attention,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "adamw_step": _adamw_step,
}
