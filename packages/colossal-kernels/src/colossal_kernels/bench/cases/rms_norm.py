"""RMS normalisation: of activations, of a wide model, of queries and keys (narrow rows), of a short sequence."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from colossal_core.ops import norms
from colossal_kernels.bench.case import Call, Function, Knobs, OpBench, Shape, moved, times

EPS = 1e-6


def _shape(rows: int, columns: int, goal_backward_ms: float | None = None) -> Shape:
    each = 2 * rows * columns
    return Shape(
        f"{times(rows, columns)} bf16",
        lambda draw: Call((draw.normal(rows, columns), draw.normal(columns), EPS)),
        {
            "forward": moved(2 * each, "2 E: x read, y written"),
            "backward": moved(3 * each, "3 E: x and the gradient of y read, that of x written", goal_backward_ms),
        },
    )


def _eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _liger() -> Function:
    from liger_kernel.ops import LigerRMSNormFunction

    operator: Any = LigerRMSNormFunction
    return lambda x, weight, eps: operator.apply(x, weight, eps, 0.0, "llama", True)


KNOBS = (
    Knobs(
        ("forward",),
        {"norms.config:FORWARD_TILE": (1024, 2048, 4096), "norms.config:FORWARD_PER_WARP": (256, 512, 1024)},
    ),
    Knobs(
        ("backward",),
        {
            "norms.config:PROGRAMS": (264, 528),
            "norms.config:BACKWARD_TILE": (1024, 2048, 4096),
            "norms.config:BACKWARD_PER_WARP": (256, 512),
        },
    ),
    Knobs(("backward",), {"norms.config:TWICE_COLUMNS": (1 << 13, 1 << 14), "norms.config:TWICE_WARPS": (16, 32)}),
)
"""Of every norm."""
BENCH = OpBench(
    "rms_norm",
    (_shape(8192, 4096, 0.068), _shape(4096, 16384), _shape(8192 * 32, 128), _shape(1024, 2048)),
    eager=_eager,
    formula=norms.rms_norm,
    peers={"liger": _liger},
    knobs=KNOBS,
)
