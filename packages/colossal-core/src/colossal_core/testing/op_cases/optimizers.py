"""Optimizer steps, and the product of Muon's iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from colossal_core.ops.adamw import AdamWSettings
from colossal_core.ops.lion import LionSettings
from colossal_core.ops.sgd import SGDSettings
from colossal_core.testing.op_cases.case import Cases, Normal, OpCase

MIXED = ((3, 5), (7,), (), (257,), (2, 256))


def _keywords(**more: Any) -> Iterator[tuple[str, tuple[tuple[int, ...], ...], dict[str, Any]]]:
    """(name, shapes of the parameters, keywords) of steps that every optimizer takes."""
    yield "mixed shapes", MIXED, {**more}
    yield "clipped", MIXED[:3], {**more, "clip": torch.tensor(0.25), "skip": torch.tensor(False)}
    yield "skipped", MIXED[:3], {**more, "clip": torch.tensor(torch.nan), "skip": torch.tensor(True)}
    yield "empty shard", ((0,), (4,)), {**more}
    yield "no parameters", (), {**more}


def _adamw_step(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    settings = AdamWSettings(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    for name, shapes, keywords in _keywords(settings=settings, step=torch.tensor(3.0)):
        lists = [[normal(*shape) for shape in shapes] for _ in range(4)]
        yield OpCase(name, (*lists[:3], [tensor.square() for tensor in lists[3]]), keywords, in_place=True)
    late = {"settings": AdamWSettings(lr=1e-3, beta2=0.9999), "step": torch.tensor(20000.0)}
    rows = [[normal(5, 4).t()], [normal(5, 4).t()], [normal(5, 4).t()], [normal(5, 4).t().square()]]
    yield OpCase("late, not contiguous", tuple(rows), late, in_place=True)


def _lion_step(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    settings = LionSettings(lr=1e-2, beta1=0.9, beta2=0.95, weight_decay=0.1)
    for name, shapes, keywords in _keywords(settings=settings):
        lists = [[normal(*shape) for shape in shapes] for _ in range(3)]
        yield OpCase(name, tuple(lists), keywords, in_place=True)


def _sgd_step(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    settings = SGDSettings(lr=1e-2, momentum=0.9, weight_decay=0.1)
    for name, shapes, keywords in _keywords(settings=settings):
        lists = [[normal(*shape) for shape in shapes] for _ in range(3)]
        yield OpCase(name, tuple(lists), keywords, in_place=True)
    yield OpCase("no momentum", ([normal(7)], [normal(7)], None), {"settings": SGDSettings(0.1)}, in_place=True)


def _symmetric_product(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, shape in (("wide", (2, 5, 12)), ("tall", (1, 17, 3)), ("one row", (3, 1, 7)), ("empty", (0, 4, 4))):
        yield OpCase(name, (normal(*shape),), {"alpha": 0.5})
    yield OpCase("whole tiles", (normal(1, 48, 32) / 4,))
    yield OpCase("not contiguous", (normal(2, 12, 5).mT,))
    yield OpCase("cut rows", (normal(2, 6, 16)[:, :, :11],))
    a = normal(2, 7, 7) / 4
    gram = (a @ a.mT).to(a.dtype)
    yield OpCase("added", (a, None, gram), {"alpha": 2.0, "beta": -4.5})
    yield OpCase("square", (gram, gram.clone(), gram.clone()), {"alpha": 2.0, "beta": -4.5})


CASES: Mapping[str, Cases] = {
    "adamw_step": _adamw_step,
    "lion_step": _lion_step,
    "sgd_step": _sgd_step,
    "symmetric_product": _symmetric_product,
}
