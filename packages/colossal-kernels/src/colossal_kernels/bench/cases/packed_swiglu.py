"""SwiGLU of one tensor that holds gate and up, as Phi-3 and transformers' experts have it."""

from __future__ import annotations

from typing import Any

from colossal_core.ops import swiglu as reference
from colossal_kernels.bench.case import Call, Function, Knobs, OpBench, Shape, moved, times


def packed(rows: int, columns: int, label: str = "", **keywords: Any) -> Shape:
    """columns: of gate and of up."""
    each = 2 * rows * columns
    return Shape(
        f"{label}{times(rows, 2, columns)} bf16",
        lambda draw: Call((draw.normal(rows, 2 * columns),), keywords),
        {
            "forward": moved(3 * each, "3 E of y: gate and up read, y written"),
            "backward": moved(5 * each, "5 E of y: gate, up and the gradient of y read, two gradients written"),
        },
    )


def _liger() -> Function:
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

    operator: Any = LigerFusedGateUpSiLUMulFunction

    def call(gate_up: Any, **keywords: Any) -> Any:
        if keywords:
            message = "Liger has halves alone"
            raise ImportError(message)
        return operator.apply(gate_up)

    return call


GPT_OSS: dict[str, Any] = {"interleaved": True, "alpha": 1.702, "limit": 7.0, "shift": 1.0}
BENCH = OpBench(
    "packed_swiglu",
    (packed(8192, 14336), packed(32768, 768), packed(16384, 2880, "gpt-oss, ", **GPT_OSS), packed(1024, 5632)),
    eager=reference.packed_swiglu,
    peers={"liger": _liger},
    knobs=(
        Knobs(
            ("backward",),
            {"gates.gated:backward_config.columns": (512, 1024, 2048), "gates.gated:backward_config.warps": (4, 8)},
        ),
    ),
)
