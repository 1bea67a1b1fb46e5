"""The product of two matrices in fp8 by each recipe. A share of the bf16 product above 100 % is what fp8 gives."""

from __future__ import annotations

from colossal_core.ops import low_precision as reference
from colossal_core.ops.low_precision import Recipe
from colossal_kernels.bench.case import Call, Draw, OpBench, Shape, multiplied, times


def _shape(rows: int, columns: int, width: int, recipe: Recipe) -> Shape:
    def call(draw: Draw) -> Call:
        left, right = recipe.granularities()
        a = reference.quantize_fp8(draw.normal(rows, width, grad=False), left)
        b = reference.quantize_fp8(draw.normal(columns, width, grad=False), right)
        return Call((*a, *b, recipe))

    label = f"{times(rows, columns, width)} fp8, {recipe}"
    return Shape(label, call, {"forward": multiplied(2 * rows * columns * width, "2 M N K")})


BENCH = OpBench(
    "scaled_matmul",
    (
        _shape(4096, 4096, 4096, Recipe.ROW),
        _shape(8192, 8192, 8192, Recipe.TENSOR),
        _shape(8192, 8192, 8192, Recipe.ROW),
        _shape(8192, 8192, 8192, Recipe.BLOCK_TILE),
    ),
)
