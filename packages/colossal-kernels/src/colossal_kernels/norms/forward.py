"""The norms' forward kernels: rows in registers, and rows too wide for them.

Legend: R rows of a tile, D features (a whole row, or a chunk of one).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_kernels.norms.config import forward_config
from colossal_kernels.row_layout import num_rows, one_a_column, row_starts, with_rows


@triton.jit
def forward_kernel(
    x, residual, weight, bias, y, total, mean, rstd, num_rows, num_columns, eps, offset,
    x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride,
    CENTRED: tl.constexpr, ADDED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """EARLY: weight and bias are fetched with the row, not when they are needed."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    starts = row_starts(rows, x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride)
    places = (rows.to(tl.int64) * num_columns)[:, None] + columns[None, :]
    x_RD = tl.load(x + starts[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    here = columns < num_columns
    if HAS_WEIGHT and EARLY:
        weight_1D = one_a_column(weight, columns, here, ROWS)
    if HAS_BIAS and EARLY:
        bias_1D = one_a_column(bias, columns, here, ROWS)
    if ADDED:
        x_RD += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        narrow_RD = x_RD.to(total.dtype.element_ty)
        tl.store(total + places, narrow_RD, mask=inside)
        x_RD = narrow_RD.to(tl.float32)
    if CENTRED:
        mean_R = tl.sum(x_RD, axis=1) / num_columns
        tl.store(mean + rows, mean_R, mask=rows < num_rows)
        x_RD = tl.where(inside, x_RD - mean_R[:, None], 0.0)
    rstd_R = 1.0 / tl.sqrt(tl.sum(x_RD * x_RD, axis=1) / num_columns + eps)
    tl.store(rstd + rows, rstd_R, mask=rows < num_rows)
    y_RD = x_RD * rstd_R[:, None]
    if HAS_WEIGHT:
        if not EARLY:
            weight_1D = one_a_column(weight, columns, here, ROWS)
        y_RD = y_RD * (weight_1D.to(tl.float32) + offset)
    if HAS_BIAS:
        if not EARLY:
            bias_1D = one_a_column(bias, columns, here, ROWS)
        y_RD = y_RD + bias_1D.to(tl.float32)
    tl.store(y + places, y_RD.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _chunk(x, residual, total, x_start, start, columns, inside, ADDED: tl.constexpr):
    """Numbers of a row as the norm sees them, float32: with the residual, and rounded like the sum that is stored."""
    x_D = tl.load(x + x_start + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        x_D += tl.load(residual + start + columns, mask=inside, other=0.0).to(tl.float32)
        x_D = x_D.to(total.dtype.element_ty).to(tl.float32)
    return x_D


@triton.jit
def wide_forward_kernel(
    x, residual, weight, bias, y, total, mean, rstd, num_columns, eps, offset,
    x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride,
    CENTRED: tl.constexpr, ADDED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row; all readings of it but the first come from the cache."""
    row = tl.program_id(0)
    x_start = row_starts(row, x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride)
    start = row.to(tl.int64) * num_columns
    centre = 0.0
    if CENTRED:
        sum_D = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in tl.range(0, num_columns, BLOCK, num_stages=STAGES):
            columns = first + tl.arange(0, BLOCK)
            sum_D += _chunk(x, residual, total, x_start, start, columns, columns < num_columns, ADDED)
        centre = tl.sum(sum_D, axis=0) / num_columns
        tl.store(mean + row, centre)
    square_D = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in tl.range(0, num_columns, BLOCK, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < num_columns
        x_D = tl.where(inside, _chunk(x, residual, total, x_start, start, columns, inside, ADDED) - centre, 0.0)
        square_D += x_D * x_D
    scale = 1.0 / tl.sqrt(tl.sum(square_D, axis=0) / num_columns + eps)
    tl.store(rstd + row, scale)
    for first in tl.range(0, num_columns, BLOCK, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < num_columns
        x_D = _chunk(x, residual, total, x_start, start, columns, inside, ADDED)
        if ADDED:
            tl.store(total + start + columns, x_D.to(total.dtype.element_ty), mask=inside)
        y_D = (x_D - centre) * scale
        if HAS_WEIGHT:
            y_D = y_D * (tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset)
        if HAS_BIAS:
            y_D = y_D + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + start + columns, y_D.to(y.dtype.element_ty), mask=inside)


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    *,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum, and of each row mean and 1/deviation in float32. Without `residual` the sum, without `centred` the mean is empty."""
    rows, columns = num_rows(x), x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y) if residual is not None else y.new_empty(0)
    mean = torch.empty(rows if centred else 0, dtype=torch.float32, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    x, layout = with_rows(x)
    residual = None if residual is None else residual.contiguous()
    flags = {"CENTRED": centred, "ADDED": residual is not None}
    flags |= {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    config = forward_config(columns, x.element_size())
    tensors = (x, residual, weight, bias, y, total, mean, rstd)
    if config.block < columns:
        wide_forward_kernel[(rows,)](
            *tensors,
            columns,
            eps,
            offset,
            *layout,
            **flags,
            BLOCK=config.block,
            STAGES=config.stages,
            num_warps=config.warps,
        )
    else:
        forward_kernel[(triton.cdiv(rows, config.rows),)](
            *tensors, rows, columns, eps, offset, *layout, **flags,
            ROWS=config.rows, BLOCK=config.block, EARLY=config.early, num_warps=config.warps,
        )  # fmt: skip
    return y, total, mean, rstd
