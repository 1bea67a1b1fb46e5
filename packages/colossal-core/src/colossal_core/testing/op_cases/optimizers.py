"""Optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from colossal_core.ops.adamw import AdamWSettings
from colossal_core.testing.op_cases.case import Cases, Normal, OpCase


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


CASES: Mapping[str, Cases] = {"adamw_step": _adamw_step}
