"""SwiGLU: of Llama 8B, of a wide model, of a short sequence."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from colossal_kernels.bench.case import Call, Function, Knobs, OpBench, Shape, moved, times


def gated(rows: int, columns: int) -> Shape:
    each = 2 * rows * columns
    return Shape(
        f"{times(rows, columns)} bf16",
        lambda draw: Call((draw.normal(rows, columns), draw.normal(rows, columns))),
        {
            "forward": moved(3 * each, "3 E: gate and up read, y written"),
            "backward": moved(5 * each, "5 E: gate, up and the gradient of y read, two gradients written"),
        },
    )


def overwritten(rows: int, columns: int) -> Shape:
    """Forward and backward, the gradients over the arguments: to see the memory."""
    each = 2 * rows * columns
    return Shape(
        f"{times(rows, columns)} bf16, gradients over the arguments",
        lambda draw: Call((draw.normal(rows, columns), draw.normal(rows, columns)), {"overwrite": True}),
        {"both": moved(8 * each, "8 E: 3 E forward and 5 E backward")},
        restored=True,
    )


def _eager(gate: Tensor, up: Tensor, **_: Any) -> Tensor:
    return F.silu(gate) * up


def _liger() -> Function:
    from liger_kernel.ops import LigerSiLUMulFunction

    operator: Any = LigerSiLUMulFunction
    return lambda gate, up, **_: operator.apply(gate, up)


TILES = {"gates.gated:TILE": (1024, 2048, 4096, 8192)}
KNOBS = (
    Knobs(("forward",), {**TILES, "gates.gated:forward_config.warps": (2, 4, 8)}),
    Knobs(("backward",), {**TILES, "gates.gated:backward_config.warps": (2, 4, 8)}),
)
"""Of every gated activation."""
BENCH = OpBench(
    "swiglu",
    (gated(8192, 14336), gated(2048, 28672), gated(1024, 5632), overwritten(8192, 14336)),
    eager=_eager,
    peers={"liger": _liger},
    knobs=KNOBS,
)
