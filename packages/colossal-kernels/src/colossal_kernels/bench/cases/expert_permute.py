"""Every expert's inputs side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from colossal_core.ops import experts as reference
from colossal_kernels.bench.case import Call, Draw, Knobs, Least, OpBench, Shape, moved

SIZES = ((8192, 4096, 128, 8), (4096, 2048, 128, 8), (8192, 4096, 8, 2))
"""Tokens, features, experts and choices of a token: those of the goals, Qwen3-30B-A3B, Mixtral."""


def ordered(draw: Draw, tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    order, inverse, _ = reference.expert_order(draw.choices(tokens, num_experts, top_k), num_experts)
    return order, inverse


def label_of(tokens: int, features: int, num_experts: int, top_k: int) -> str:
    return f"{tokens} tokens top {top_k} of {num_experts}, {features} features bf16"


def _shape(tokens: int, features: int, num_experts: int, top_k: int) -> Shape:
    row = 2 * features

    def call(draw: Draw) -> Call:
        return Call((draw.normal(tokens, features), *ordered(draw, tokens, num_experts, top_k)))

    least: Least = moved((1 + top_k) * tokens * row, "(1 + K) N D elements: a token read, K rows written, or back")
    return Shape(label_of(tokens, features, num_experts, top_k), call, {"forward": least, "backward": least})


def _eager(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return torch.index_select(x, 0, order // inverse.shape[1])


KNOBS = (
    Knobs(
        ("forward", "backward"),
        {
            "experts.rows:TILE_COLUMNS": (512, 1024),
            "experts.rows:WARPS": (2, 4, 8),
        },
    ),
)
"""Of both ways."""
BENCH = OpBench(
    "expert_permute",
    tuple(_shape(*sizes) for sizes in SIZES),
    eager=_eager,
    knobs=KNOBS,
)
