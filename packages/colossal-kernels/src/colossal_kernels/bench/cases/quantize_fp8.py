"""A matrix in fp8, with its transpose where the backward pass of a linear layer needs it."""

from __future__ import annotations

from colossal_core.ops import low_precision as reference
from colossal_core.ops.low_precision import Granularity
from colossal_kernels.bench.case import Call, Knobs, OpBench, Shape, moved, times


def _shape(rows: int, columns: int, granularity: Granularity, *, transposed: bool = False) -> Shape:
    twice = granularity == Granularity.TENSOR or (granularity == Granularity.ROW and transposed)
    bytes_each = 3 + transposed + 2 * twice
    said = "bytes an element: 2 read, 1 written, 1 more transposed; 2 more per tensor and for rows of both, whose largest is found first"
    return Shape(
        f"{times(rows, columns)} bf16, {granularity}{', transposed too' if transposed else ''}",
        lambda draw: Call((draw.normal(rows, columns, grad=False), granularity), {"transposed": transposed}),
        {"forward": moved(bytes_each * rows * columns, said)},
    )


_MODULE = "low_precision.quantize_fp8"
BENCH = OpBench(
    "quantize_fp8",
    (
        _shape(8192, 4096, Granularity.ROW),
        _shape(8192, 14336, Granularity.TENSOR, transposed=True),
        _shape(8192, 4096, Granularity.BLOCK, transposed=True),
        _shape(4096, 4096, Granularity.TILE, transposed=True),
        _shape(4096, 4096, Granularity.ROW, transposed=True),
    ),
    eager=reference.quantize_fp8,
    compared="float32",
    knobs=(
        Knobs(
            ("forward",), {f"{_MODULE}:CODES_TILE": ((64, 64), (128, 64), (64, 128)), f"{_MODULE}:CODES_WARPS": (4, 8)}
        ),
        Knobs(("forward",), {f"{_MODULE}:LARGEST_TILE": ((64, 64), (64, 128)), f"{_MODULE}:LARGEST_WARPS": (4, 8)}),
        Knobs(("forward",), {f"{_MODULE}:BLOCK_PART": (32, 64), f"{_MODULE}:BLOCK_WARPS": (4, 8)}),
        Knobs(("forward",), {f"{_MODULE}:SQUARE_PART": (64, 128), f"{_MODULE}:SQUARE_WARPS": (8, 16)}),
        Knobs(("forward",), {f"{_MODULE}:ROW_WARP_ELEMENTS": (512, 1024, 2048)}),
    ),
)
"""A kernel's settings matter to the shapes that it serves: those of both passes, of blocks, of tiles, of whole rows."""
