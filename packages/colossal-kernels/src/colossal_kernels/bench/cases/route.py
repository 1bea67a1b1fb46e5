"""The experts of each token and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from colossal_kernels.bench.case import Call, Knobs, OpBench, Shape, moved


def _shape(tokens: int, num_experts: int, top_k: int, *, normalize: bool = True) -> Shape:
    read, written = 2 * tokens * num_experts, 12 * tokens * top_k
    back = 2 * read + 8 * tokens * top_k + 4 * tokens * top_k
    words = "" if normalize else ", not normalised"
    return Shape(
        f"{tokens} tokens top {top_k} of {num_experts} bf16{words}",
        lambda draw: Call((draw.normal(tokens, num_experts), top_k), {"normalize": normalize}),
        {
            "forward": moved(read + written, "logits read; weights (4 bytes) and experts (8) written"),
            "backward": moved(back, "logits, experts and gradient read, that of the logits written"),
        },
    )


def _eager(logits: Tensor, top_k: int, *, normalize: bool = True) -> tuple[Tensor, Tensor]:
    weights, experts = torch.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if normalize else weights), experts


BENCH = OpBench(
    "route",
    (_shape(8192, 128, 8), _shape(32768, 64, 8, normalize=False), _shape(4096, 8, 2)),
    eager=_eager,
    knobs=(Knobs(("forward", "backward"), {"experts.route:TILE_ELEMENTS": (1024, 2048, 4096, 8192)}),),
)
