"""Mixture of experts. Letters: N tokens, K choices, E experts, D features, F hidden features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from colossal_core.ops import experts as reference
from colossal_core.testing.op_cases.case import Cases, Normal, OpCase


def _chosen(generator: torch.Generator, num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    """Different experts for the choices of a token."""
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]


def _route(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, shape, top_k in (
        ("two of eight", (5, 8), 2),
        ("odd", (7, 13), 3),
        ("all", (3, 4), 4),
        ("one", (1, 1), 1),
    ):
        yield OpCase(name, (normal(*shape), top_k))
        yield OpCase(f"{name}, not normalized", (normal(*shape), top_k), {"normalize": False})
    yield OpCase("rows apart", (normal(4, 12)[:, :6], 2))
    yield OpCase("empty", (normal(0, 4), 2))


def _expert_order(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del normal
    yield OpCase("two of eight", (_chosen(generator, 9, 8, 2), 8))
    yield OpCase("int32", (_chosen(generator, 5, 3, 2).to(torch.int32), 3))
    yield OpCase("more than a block", (torch.randint(5, (67, 3), generator=generator), 5))
    yield OpCase("one expert", (torch.zeros(3, 1, dtype=torch.int64), 1))
    yield OpCase("experts of other ranks", (_chosen(generator, 6, 8, 3) - 2, 4))
    yield OpCase("filled up", (_chosen(generator, 7, 5, 2), 5), {"multiple": 8})
    yield OpCase("other ranks, filled up", (_chosen(generator, 7, 5, 2) - 1, 3), {"multiple": 4})
    yield OpCase("empty", (torch.zeros(0, 2, dtype=torch.int64), 3), {"multiple": 8})


def _layouts(generator: torch.Generator) -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor]]:
    """Name, tokens, order, inverse."""
    for name, tokens, num_experts, top_k, multiple in (
        ("two choices", 5, 4, 2, 1),
        ("three choices", 4, 7, 3, 1),
        ("one choice", 6, 3, 1, 1),
        ("filled up", 5, 3, 2, 4),
    ):
        order, inverse, _ = reference.expert_order(
            _chosen(generator, tokens, num_experts, top_k), num_experts, multiple=multiple
        )
        yield name, tokens, order, inverse
    order, inverse, _ = reference.expert_order(_chosen(generator, 5, 6, 3) - 2, 3)
    yield "experts of other ranks", 5, order, inverse


def _expert_permute(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    for (name, tokens, order, inverse), width in zip(_layouts(generator), (16, 7, 1, 12, 8), strict=True):
        yield OpCase(name, (normal(tokens, width), order, inverse))
    order, inverse, _ = reference.expert_order(_chosen(generator, 4, 4, 2), 4)
    yield OpCase("not contiguous", (normal(6, 4).t(), order, inverse))
    yield OpCase("rows apart", (normal(4, 9)[:, :6], order, inverse))
    yield OpCase("empty", (normal(0, 4), order[:0], inverse[:0]))


def _expert_unpermute(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    for (name, tokens, order, inverse), width in zip(_layouts(generator), (16, 7, 1, 12, 8), strict=True):
        yield OpCase(name, (normal(len(order), width), order, inverse, normal(tokens, inverse.shape[1])))
        yield OpCase(f"{name}, no weights", (normal(len(order), width), order, inverse))
    order, inverse, _ = reference.expert_order(_chosen(generator, 4, 4, 2), 4)
    yield OpCase("not contiguous", (normal(6, 8).t(), order, inverse, normal(2, 4).t()))
    yield OpCase("empty", (normal(0, 4), order[:0], inverse[:0], normal(0, 2)))


def _grouped_matmul(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, counts, features, hidden in (
        ("three experts", (2, 3, 1), 8, 16),
        ("one without rows", (4, 0, 2), 16, 8),
        ("odd", (1, 5), 7, 3),
        ("no rows", (0, 0), 8, 8),
    ):
        offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        yield OpCase(name, (normal(sum(counts), features), normal(len(counts), features, hidden), offsets))
        transposed = normal(len(counts), hidden, features).transpose(1, 2)
        yield OpCase(f"{name}, transposed", (normal(sum(counts), features), transposed, offsets))


def _experts(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    for name, (tokens, num_experts, top_k, features, hidden) in (
        ("two of four", (6, 4, 2, 8, 16)),
        ("odd", (5, 3, 3, 7, 5)),
        ("most without tokens", (2, 9, 1, 8, 8)),
        ("one", (1, 1, 1, 1, 1)),
        ("empty", (0, 4, 2, 8, 8)),
    ):
        matrices = normal(num_experts, 2 * hidden, features), normal(num_experts, features, hidden)
        chosen = _chosen(generator, tokens, num_experts, top_k)
        yield OpCase(name, (normal(tokens, features), *matrices, chosen, normal(tokens, top_k)))
    matrices = normal(2, 12, 8), normal(2, 8, 6)
    yield OpCase("experts of other ranks", (normal(5, 8), *matrices, _chosen(generator, 5, 6, 3) - 2, normal(5, 3)))


CASES: Mapping[str, Cases] = {
    "route": _route,
    "expert_order": _expert_order,
    "expert_permute": _expert_permute,
    "expert_unpermute": _expert_unpermute,
    "grouped_matmul": _grouped_matmul,
    "experts": _experts,
}
