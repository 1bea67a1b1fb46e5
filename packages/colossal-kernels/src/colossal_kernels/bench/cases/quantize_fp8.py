"""A matrix in fp8, with its transpose where the backward pass of a linear layer needs it."""

from __future__ import annotations

from colossal_core.ops import low_precision as reference
from colossal_core.ops.low_precision import Granularity
from colossal_kernels.bench.case import Call, Knobs, OpBench, Shape, moved, times


def _shape(rows: int, columns: int, granularity: Granularity, *, transposed: bool = False) -> Shape:
    bytes_each = 3 + transposed + 2 * (granularity == Granularity.TENSOR)
    said = "bytes an element: 2 read, 1 written, 1 more transposed; per tensor 2 more, the largest is found first"
    return Shape(
        f"{times(rows, columns)} bf16, {granularity}{', transposed too' if transposed else ''}",
        lambda draw: Call((draw.normal(rows, columns, grad=False), granularity), {"transposed": transposed}),
        {"forward": moved(bytes_each * rows * columns, said)},
    )


BENCH = OpBench(
    "quantize_fp8",
    (
        _shape(8192, 4096, Granularity.ROW),
        _shape(8192, 14336, Granularity.TENSOR, transposed=True),
        _shape(8192, 4096, Granularity.BLOCK, transposed=True),
        _shape(4096, 4096, Granularity.TILE, transposed=True),
    ),
    eager=reference.quantize_fp8,
    compared="float32",
    knobs=(
        Knobs(
            ("forward",),
            {
                "low_precision.quantize_fp8:FREE_SIDE": (32, 64, 128),
                "low_precision.quantize_fp8:FREE_WARPS": (2, 4, 8),
                "low_precision.quantize_fp8:WARPS": (4, 8, 16),
                "low_precision.quantize_fp8:TILE_WARPS": (8, 16),
            },
        ),
    ),
)
