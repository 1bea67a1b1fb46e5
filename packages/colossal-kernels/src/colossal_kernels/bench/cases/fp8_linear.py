"""A linear layer in fp8, quantization included, beside the same in bf16: forward, and both gradients from what was quantized transposed."""

from __future__ import annotations

from torch import Tensor

from colossal_core.ops.low_precision import Granularity, Recipe
from colossal_kernels.bench.case import Call, Function, OpBench, Shape, multiplied, times


def _shape(size: int) -> Shape:
    """x, weight and the gradient of the result, all squares of this size; the bf16 product's rate times 1.5 is the goal."""
    flops = 6 * size**3
    return Shape(
        f"{times(size, size, size)} bf16",
        lambda draw: Call(tuple(draw.normal(size, size, scale=size**-0.5, grad=False) for _ in range(3))),
        {"forward": multiplied(flops, "6 N^3: the result and two gradients")},
    )


def _eager(x: Tensor, weight: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x @ weight.t(), grad_y @ weight, grad_y.t() @ x


def _ours() -> Function:
    from colossal_kernels.table import implementations

    found = {entry.op: entry.function for entry in implementations()}
    if not {"quantize_fp8", "scaled_matmul"} <= set(found):
        message = "no kernels of quantize_fp8 and scaled_matmul"
        raise ImportError(message)
    quantize_fp8, scaled_matmul = found["quantize_fp8"], found["scaled_matmul"]

    def call(x: Tensor, weight: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_codes, x_scale, x_t, x_t_scale = quantize_fp8(x, Granularity.ROW, transposed=True)
        w_codes, w_scale, w_t, w_t_scale = quantize_fp8(weight, Granularity.ROW, transposed=True)
        g_codes, g_scale, g_t, g_t_scale = quantize_fp8(grad_y, Granularity.ROW, transposed=True)
        y = scaled_matmul(x_codes, x_scale, w_codes, w_scale, Recipe.ROW)
        grad_x = scaled_matmul(g_codes, g_scale, w_t, w_t_scale, Recipe.ROW)
        return y, grad_x, scaled_matmul(g_t, g_t_scale, x_t, x_t_scale, Recipe.ROW)

    return call


BENCH = OpBench(
    "fp8_linear",
    (_shape(4096), _shape(8192), _shape(2048)),
    eager=_eager,
    ours=_ours,
    reference=_eager,
    compared="float32",
)
