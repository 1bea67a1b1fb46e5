"""RMS normalisation into 8 bits with a scale for each row."""

from __future__ import annotations

from colossal_core.ops import norms
from colossal_kernels.bench.case import Call, OpBench, Shape, moved, times
from colossal_kernels.bench.cases.rms_norm import KNOBS


def _shape(rows: int, columns: int) -> Shape:
    return Shape(
        f"{times(rows, columns)} bf16",
        lambda draw: Call((draw.normal(rows, columns, grad=False), draw.normal(columns, grad=False), 1e-6)),
        {"forward": moved(3 * rows * columns, "3 N D: x read in 16 bits, y written in 8")},
    )


BENCH = OpBench(
    "rms_norm_fp8",
    (_shape(8192, 4096), _shape(4096, 16384), _shape(1024, 2048)),
    eager=norms.rms_norm_fp8,
    compared="float32",
    knobs=KNOBS[:1],
)
