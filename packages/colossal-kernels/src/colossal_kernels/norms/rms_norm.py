"""RMS normalisation: one read and one write forward; backward two reads and one write, and a float32 row of the weight's gradient for each
program. Legend: N rows (all leading dimensions flattened), D features, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops import norms as reference
from colossal_kernels.builds import Build
from colossal_kernels.library import define, differentiate

MOST_COLUMNS = 1 << 14
"""A row is held in registers; wider ones stay with the reference."""
BACKWARD_PROGRAMS = 264
"""Two for each of an H200's 132 multiprocessors. Fixed, so that sums are taken in the same order on every GPU."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`colossal_core.ops.reference.rms_norm`, computed in float32 throughout.

    Saves x and one float32 a row for the backward pass. Rows may have any stride; other layouts are copied first.
    """
    if not 0 < x.shape[-1] <= MOST_COLUMNS or x.numel() == 0 or x.dtype == torch.float64:
        return reference.rms_norm(x, weight, eps)
    y: Tensor = _FORWARD(x, weight, eps)[0]
    return y


@triton.jit
def _forward_kernel(x, weight, y, rstd, row_stride, num_columns, eps, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    x_D = tl.load(x + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_D * x_D, axis=0) / num_columns + eps)
    tl.store(rstd + row, scale)
    y_D = x_D * scale
    if HAS_WEIGHT:
        y_D = y_D * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * num_columns + columns, y_D.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_y, x, weight, rstd, grad_x, partial, grad_stride, row_stride, num_rows, num_columns,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    grad_weight_D = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_WEIGHT:
        weight_D = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    row = program.to(tl.int64)
    for _ in range(tl.cdiv(num_rows - program, tl.num_programs(0))):
        x_D = tl.load(x + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
        grad_D = tl.load(grad_y + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        normal_D = x_D * scale
        if HAS_WEIGHT:
            grad_weight_D += grad_D * normal_D
            grad_D = grad_D * weight_D
        mean = tl.sum(grad_D * normal_D, axis=0) / num_columns
        grad_x_D = (grad_D - normal_D * mean) * scale
        tl.store(grad_x + row * num_columns + columns, grad_x_D.to(grad_x.dtype.element_ty), mask=inside)
        row += tl.num_programs(0)
    if HAS_WEIGHT:
        tl.store(partial + program * num_columns + columns, grad_weight_D, mask=inside)


def _rows(x: Tensor) -> Tensor:
    """[N, D] with neighbouring features; a copy where the layout has none."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def _forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    x_ND = _rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty(len(x_ND), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(x_ND.shape[1])
    _forward_kernel[(len(x_ND),)](
        x_ND, weight, y, rstd, x_ND.stride(0), x_ND.shape[1], eps, weight is not None, block, num_warps=_warps(block)
    )  # fmt: skip
    return y, rstd


def _backward(grad_y: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    x_ND, grad_ND = _rows(x), _rows(grad_y)
    num_rows, num_columns = x_ND.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    programs = min(BACKWARD_PROGRAMS, num_rows)
    partial = torch.empty((programs if weight is not None else 0, num_columns), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(num_columns)
    _backward_kernel[(programs,)](
        grad_ND, x_ND, weight, rstd, grad_x, partial, grad_ND.stride(0), x_ND.stride(0), num_rows, num_columns,
        weight is not None, block, num_warps=_warps(block),
    )  # fmt: skip
    return grad_x, partial.sum(0) if weight is None else partial.sum(0).to(weight.dtype)


def _forward_fake(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(rows, dtype=torch.float32)


def _backward_fake(grad_y: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    grad_weight = x.new_empty(x.shape[-1], dtype=torch.float32) if weight is None else torch.empty_like(weight)
    return torch.empty_like(x, memory_format=torch.contiguous_format), grad_weight


_FORWARD = define("rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)", _forward, _forward_fake)
_BACKWARD = define(
    "rms_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_y: Tensor | None, grad_rstd: None) -> tuple[Tensor | None, Tensor | None, None]:
    del grad_rstd
    if grad_y is None:
        return None, None, None
    x, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = _BACKWARD(grad_y, x, weight, rstd)
    return grad_x, None if weight is None else grad_weight, None


differentiate("rms_norm", _gradients, _save)


def builds() -> tuple[Build, ...]:
    """What a Llama (4096 features, bf16) and a wide model launch."""
    found = []
    for dtype, columns in (("bf16", 4096), ("fp32", 4096), ("bf16", MOST_COLUMNS)):
        shared = {"HAS_WEIGHT": True, "BLOCK": columns}
        forward = {"x": f"*{dtype}", "weight": f"*{dtype}", "y": f"*{dtype}", "rstd": "*fp32"}
        forward |= {"row_stride": "i32", "num_columns": "i32", "eps": "fp32"}
        name = f"{dtype} {columns}"
        aligned = ("row_stride", "grad_stride", "num_columns")
        found.append(Build(f"rms_norm {name}", _forward_kernel, forward, shared, _warps(columns), aligned=aligned))
        backward = {"grad_y": f"*{dtype}", "x": f"*{dtype}", "weight": f"*{dtype}", "rstd": "*fp32", "partial": "*fp32"}
        backward |= {"grad_x": f"*{dtype}", "grad_stride": "i32", "row_stride": "i32"}
        backward |= {"num_rows": "i32", "num_columns": "i32"}
        found.append(
            Build(f"rms_norm_backward {name}", _backward_kernel, backward, shared, _warps(columns), aligned=aligned)
        )
    return tuple(found)
