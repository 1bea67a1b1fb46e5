"""The residual addition and the RMS normalisation after it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from colossal_core.ops import norms
from colossal_kernels.bench.case import Call, Function, OpBench, Shape, moved, times
from colossal_kernels.bench.cases.rms_norm import KNOBS


def _shape(rows: int, columns: int) -> Shape:
    each = 2 * rows * columns
    return Shape(
        f"{times(rows, columns)} bf16",
        lambda draw: Call((draw.normal(rows, columns), draw.normal(rows, columns), draw.normal(columns), 1e-6)),
        {
            "forward": moved(4 * each, "4 E: x and residual read, y and the sum written"),
            "backward": moved(4 * each, "4 E: the sum and both gradients read, one written, which is that of both"),
        },
    )


def _eager(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, (x.shape[-1],), weight, eps), total


def _liger() -> Function:
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    operator: Any = LigerFusedAddRMSNormFunction
    return lambda x, residual, weight, eps: operator.apply(x, residual, weight, eps, 0.0, "llama", False)


BENCH = OpBench(
    "add_rms_norm",
    (_shape(8192, 4096), _shape(4096, 16384), _shape(1024, 2048)),
    eager=_eager,
    formula=norms.add_rms_norm,
    peers={"liger": _liger},
    knobs=KNOBS,
)
