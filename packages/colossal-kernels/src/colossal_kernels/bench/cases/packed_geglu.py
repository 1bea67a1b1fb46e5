"""GeGLU of one tensor that holds gate and up."""

from __future__ import annotations

from colossal_core.ops import swiglu as reference
from colossal_kernels.bench.case import OpBench
from colossal_kernels.bench.cases.packed_swiglu import packed
from colossal_kernels.bench.cases.swiglu import KNOBS

BENCH = OpBench(
    "packed_geglu",
    (
        packed(8192, 14336, "tanh, ", approximate="tanh"),
        packed(2048, 24576, "tanh, ", approximate="tanh"),
        packed(1024, 4096),
    ),
    eager=reference.packed_geglu,
    knobs=KNOBS,
)
