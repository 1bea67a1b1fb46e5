"""A whole layer of experts, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from colossal_kernels.bench.case import Call, Draw, Function, Knobs, OpBench, Shape, multiplied


def _shape(
    label: str, tokens: int, features: int, hidden: int, num_experts: int, top_k: int, goal_ms: float | None = None
) -> Shape:
    def call(draw: Draw) -> Call:
        gate_up = draw.normal(num_experts, 2 * hidden, features, scale=features**-0.5)
        down = draw.normal(num_experts, features, hidden, scale=hidden**-0.5)
        weights = torch.softmax(draw.normal(tokens, top_k, dtype=torch.float32, grad=False), dim=-1)
        chosen = draw.choices(tokens, num_experts, top_k)
        return Call((draw.normal(tokens, features), gate_up, down, chosen, weights.requires_grad_()))

    flops = 18 * tokens * top_k * features * hidden
    said = "18 N K D F: three products, each once forward and twice backward"
    return Shape(
        f"{label}: {tokens} tokens top {top_k} of {num_experts}, {features} -> {hidden} bf16",
        call,
        {"both": multiplied(flops, said, goal_ms)},
    )


def _eager(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """In torch's own grouped products, as transformers' `grouped_mm` experts do it."""
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.zeros(len(gate_up), dtype=torch.int32, device=x.device)
    stops = counts.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0).to(torch.int32)
    tokens = order // chosen.shape[1]
    gate, up = F.grouped_mm(x[tokens], gate_up.transpose(1, 2), offs=stops).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=stops)
    weighted = (y * weights.reshape(-1)[order].unsqueeze(1)).to(x.dtype)
    return torch.zeros_like(x).index_add(0, tokens, weighted)


def _liger() -> Function:
    """Without its autotuning, which takes longer than a benchmark may."""
    import os

    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    from liger_kernel.ops import LigerFusedMoEFunction

    operator: Any = LigerFusedMoEFunction
    return lambda x, gate_up, down, chosen, weights: operator.apply(x, gate_up, down, chosen, weights)


_GATE = "experts.weighted_swiglu"
KNOBS = (Knobs(("both",), {f"{_GATE}:ROWS": (4, 8), f"{_GATE}:WARPS": (4, 8)}),)
BENCH = OpBench(
    "experts",
    (
        _shape("Qwen3-30B-A3B", 4096, 2048, 768, 128, 8, 2.2),
        _shape("Mixtral 8x7B", 4096, 4096, 14336, 8, 2),
        _shape("OLMoE", 2048, 2048, 1024, 64, 8),
    ),
    eager=_eager,
    peers={"liger": _liger},
    knobs=KNOBS,
)
