"""The experts' outputs back at their tokens, weighted and summed."""

from __future__ import annotations

import torch
from torch import Tensor

from colossal_kernels.bench.case import Call, Draw, Knobs, OpBench, Shape, moved
from colossal_kernels.bench.cases.expert_permute import SIZES, label_of, ordered


def _shape(tokens: int, features: int, num_experts: int, top_k: int) -> Shape:
    row = 2 * features

    def call(draw: Draw) -> Call:
        y = draw.normal(tokens * top_k, features)
        weights = draw.normal(tokens, top_k, dtype=torch.float32)
        return Call((y, *ordered(draw, tokens, num_experts, top_k), weights))

    return Shape(
        label_of(tokens, features, num_experts, top_k),
        call,
        {
            "forward": moved((1 + top_k) * tokens * row, "(1 + K) N D elements: K rows read, a token written"),
            "backward": moved(
                (1 + 2 * top_k) * tokens * row, "(1 + 2 K) N D elements: the gradient and y read, K rows written"
            ),
        },
    )


def _eager(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    del order
    return (y[inverse] * weights.unsqueeze(2)).sum(1).to(y.dtype)


BENCH = OpBench(
    "expert_unpermute",
    tuple(_shape(*sizes) for sizes in SIZES),
    eager=_eager,
    knobs=(
        Knobs(("forward",), {"experts.rows:TILE_COLUMNS": (512, 1024), "experts.rows:WARPS": (2, 4)}),
        Knobs(
            ("backward",),
            {
                "experts.rows:TILE_COLUMNS": (512, 1024),
                "experts.rows:WARPS": (2, 4, 8),
                "experts.rows:SUMMED_BYTES": (2, 16),
            },
        ),
    ),
)
