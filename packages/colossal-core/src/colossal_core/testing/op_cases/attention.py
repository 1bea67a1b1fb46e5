"""Rotary embedding and attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from colossal_core.testing.op_cases.case import Cases, Normal, OpCase


def _rotary(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, queries, keys, width in (("grouped", 4, 2, 8), ("partly turned", 3, 3, 4)):
        angles = normal(1, 5, width // 2)
        both = torch.cat([angles, angles], dim=-1)
        yield OpCase(name, (normal(2, queries, 5, 8), normal(2, keys, 5, 8), both.cos().detach(), both.sin().detach()))
    yield OpCase("empty", (normal(0, 2, 3, 4), normal(0, 2, 3, 4), normal(1, 3, 4), normal(1, 3, 4)))


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


CASES: Mapping[str, Cases] = {"rotary": _rotary, "attention": _attention}
