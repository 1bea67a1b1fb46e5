"""Rotary embedding and attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from colossal_core.testing.op_cases.case import Cases, Normal, OpCase


def _rotary(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    """Angles are keywords, which are not differentiated: no model trains them."""
    del generator
    for name, queries, keys, width in (("grouped", 4, 2, 8), ("partly turned", 3, 3, 4), ("one pair", 1, 1, 2)):
        yield OpCase(name, (normal(2, queries, 5, 8), normal(2, keys, 5, 8)), _angles(normal(1, 5, width // 2)))
    yield OpCase("tokens before heads", _transposed(normal, 3), _angles(normal(2, 5, 4)))
    part = {"interleaved": True, **_angles(normal(1, 5, 3))}
    yield OpCase("interleaved", (normal(2, 3, 5, 8), normal(2, 3, 5, 8)), part)
    repeated = {"interleaved": True, "angles": "neighbours", **_angles(normal(1, 5, 4).repeat_interleave(2, -1), 1)}
    yield OpCase("interleaved angles", _transposed(normal, 2), repeated)
    sorted_out = {"interleaved": True, "to_halves": True, **_angles(normal(1, 5, 3))}
    yield OpCase("interleaved to halves", _transposed(normal, 1), sorted_out)
    once = {"angles": "once", **_angles(normal(1, 5, 4), 1)}
    yield OpCase("angles once", (normal(2, 2, 5, 8), normal(2, 1, 5, 8)), once)
    angles = tuple(_angles(normal(1, 5, 4)).values())
    yield OpCase("angles with gradients", (normal(2, 2, 5, 8), normal(2, 2, 5, 8), *angles))
    yield OpCase("empty", (normal(0, 2, 3, 4), normal(0, 2, 3, 4)), _angles(normal(1, 3, 2)))


def _angles(angles: torch.Tensor, times: int = 2) -> dict[str, Any]:
    repeated = torch.cat([angles] * times, dim=-1)
    return {"cos": repeated.cos(), "sin": repeated.sin()}


def _transposed(normal: Normal, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys as models pass them: [B, L, H, D] in memory."""
    return normal(2, 5, 3, 8).transpose(1, 2), normal(2, 5, keys, 8).transpose(1, 2)


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


def _merge_attention(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator

    def part(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        lse = normal(*shape[:-1])
        return normal(*shape), lse if lse.dtype == torch.float64 else lse.float()

    def case(name: str, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> OpCase:
        return OpCase(name, ([out for out, _ in parts], [lse for _, lse in parts]))

    yield case("two", [part(2, 3, 5, 8) for _ in range(2)])
    yield case("five of odd width", [part(1, 2, 3, 7) for _ in range(5)])
    yield case("one", [part(1, 2, 3, 4)])
    yield case("empty", [part(2, 0, 3, 4) for _ in range(2)])
    far = [(normal(1, 1, 4, 8), lse + 40.0 * (number - 1)) for number, (_, lse) in enumerate([part(1, 1, 4, 8)] * 3)]
    yield case("far apart", far)
    turned = [(normal(2, 5, 3, 8).transpose(1, 2), part(2, 3, 5, 8)[1].contiguous()) for _ in range(2)]
    yield case("heads behind positions", turned)


CASES: Mapping[str, Cases] = {"rotary": _rotary, "attention": _attention, "merge_attention": _merge_attention}
