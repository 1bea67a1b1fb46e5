"""Layer normalisation, with weight and bias: of GPT-2's and wider activations."""

from __future__ import annotations

from typing import Any

from colossal_core.ops import norms
from colossal_kernels.bench.case import Call, Function, OpBench, Shape, moved, times
from colossal_kernels.bench.cases.rms_norm import KNOBS


def _shape(rows: int, columns: int) -> Shape:
    each = 2 * rows * columns
    return Shape(
        f"{times(rows, columns)} bf16",
        lambda draw: Call((draw.normal(rows, columns), draw.normal(columns), draw.normal(columns), 1e-5)),
        {
            "forward": moved(2 * each, "2 E: x read, y written"),
            "backward": moved(3 * each, "3 E: x and the gradient of y read, that of x written"),
        },
    )


def _liger() -> Function:
    from liger_kernel.ops import LigerLayerNormFunction

    operator: Any = LigerLayerNormFunction
    return lambda x, weight, bias, eps: operator.apply(x, weight, bias, eps)


BENCH = OpBench(
    "layer_norm",
    (_shape(8192, 4096), _shape(16384, 1600), _shape(1024, 768)),
    eager=norms.layer_norm,
    peers={"liger": _liger},
    knobs=KNOBS,
)
