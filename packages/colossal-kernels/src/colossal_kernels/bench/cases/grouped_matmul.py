"""Each expert's rows times its matrix, which lies as transformers keeps it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from colossal_kernels.bench.case import Call, Draw, OpBench, Shape, multiplied


def _shape(num_experts: int, rows: int, features: int, hidden: int, *, even: bool = True) -> Shape:
    """rows: of an expert, in the mean."""
    whole = num_experts * rows

    def call(draw: Draw) -> Call:
        shares = torch.ones(num_experts, device=draw.device)
        if not even:
            shares = 1.0 / (1.0 + torch.arange(num_experts, device=draw.device) / 8.0)
        stops = (shares.cumsum(0) / shares.sum() * whole).round().to(torch.int32)
        offsets = torch.cat([stops.new_zeros(1), stops])
        weights = draw.normal(num_experts, hidden, features, scale=features**-0.5).detach().requires_grad_()
        return Call((draw.normal(whole, features), weights.transpose(1, 2), offsets))

    flops = 2 * whole * features * hidden
    return Shape(
        f"{num_experts} experts, {whole} rows {'each alike' if even else 'unevenly'}, {features} -> {hidden} bf16",
        call,
        {
            "forward": multiplied(flops, "2 M D F"),
            "backward": multiplied(2 * flops, "4 M D F: of the rows and of the matrices"),
        },
    )


def _eager(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x, weights, offs=offsets[1:])


BENCH = OpBench(
    "grouped_matmul",
    (
        _shape(128, 256, 2048, 1536),
        _shape(128, 256, 768, 2048, even=False),
        _shape(8, 4096, 4096, 14336),
    ),
    eager=_eager,
)
