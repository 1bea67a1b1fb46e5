"""The residual addition and the layer normalisation after it."""

from __future__ import annotations

from colossal_core.ops import norms
from colossal_kernels.bench.case import Call, Draw, OpBench, Shape, moved, times
from colossal_kernels.bench.cases.rms_norm import KNOBS


def _shape(rows: int, columns: int) -> Shape:
    each = 2 * rows * columns

    def call(draw: Draw) -> Call:
        both = (draw.normal(rows, columns), draw.normal(rows, columns))
        return Call((*both, draw.normal(columns), draw.normal(columns), 1e-5))

    return Shape(
        f"{times(rows, columns)} bf16",
        call,
        {
            "forward": moved(4 * each, "4 E: x and residual read, y and the sum written"),
            "backward": moved(4 * each, "4 E: the sum and both gradients read, one written, which is that of both"),
        },
    )


BENCH = OpBench(
    "add_layer_norm",
    (_shape(8192, 4096), _shape(16384, 1600), _shape(1024, 768)),
    eager=norms.add_layer_norm,
    knobs=KNOBS,
)
