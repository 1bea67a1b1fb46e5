"""The norms' backward kernels: rows in registers, and rows too wide for them.

With `n = (x - mean) * rstd`, `g = (offset + weight) * grad_y`: `grad_x = rstd * (g - avg(g) - n * avg(g * n)) + grad_sum` (without `avg(g)`
for RMS norms), `grad_weight = sum over rows of grad_y * n`, `grad_bias = sum over rows of grad_y`. A fixed number of programs sums its rows
in a fixed order, and a small kernel the programs' sums: no atomics. Legend: R rows of a tile, D features (a whole row, or a chunk of one).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_kernels.norms.config import backward_config
from colossal_kernels.row_layout import num_rows, row_starts, with_rows


@triton.jit
def backward_kernel(
    grad_y, grad_total, x, weight, mean, rstd, grad_x, partial, num_rows, num_columns, offset,
    g_middle, g_inner, g_outer_stride, g_middle_stride, g_inner_stride,
    x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride,
    CENTRED: tl.constexpr, ADDED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    here = columns < num_columns
    grad_weight_RD = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    grad_bias_RD = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if HAS_WEIGHT:  # once: in the loop it would be fetched with every row
        weight_D = tl.load(weight + columns, mask=here, other=0.0)
    for first in tl.range(program * ROWS, num_rows, programs * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & here[None, :]
        g_starts = row_starts(rows, g_middle, g_inner, g_outer_stride, g_middle_stride, g_inner_stride)
        x_starts = row_starts(rows, x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride)
        places = (rows.to(tl.int64) * num_columns)[:, None] + columns[None, :]
        n_RD = tl.load(x + x_starts[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        g_RD = tl.load(grad_y + g_starts[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        rstd_R = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
        if CENTRED:
            n_RD = tl.where(inside, n_RD - tl.load(mean + rows, mask=rows < num_rows, other=0.0)[:, None], 0.0)
        n_RD = n_RD * rstd_R[:, None]
        if HAS_BIAS:
            grad_bias_RD += g_RD
        if HAS_WEIGHT:
            grad_weight_RD += g_RD * n_RD
            g_RD = g_RD * (weight_D.to(tl.float32) + offset)[None, :]
        along_R = tl.sum(g_RD * n_RD, axis=1) / num_columns
        if CENTRED:
            g_RD = g_RD - (tl.sum(g_RD, axis=1) / num_columns)[:, None]
        grad_RD = (g_RD - n_RD * along_R[:, None]) * rstd_R[:, None]
        if ADDED:
            grad_RD += tl.load(grad_total + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + places, grad_RD.to(grad_x.dtype.element_ty), mask=inside)
    own = partial + program.to(tl.int64) * num_columns + columns
    if HAS_WEIGHT:
        tl.store(own, tl.sum(grad_weight_RD, axis=0), mask=here)
    if HAS_BIAS:
        bias = own + programs.to(tl.int64) * num_columns
        tl.store(bias, tl.sum(grad_bias_RD, axis=0), mask=here)


@triton.jit
def wide_backward_kernel(
    grad_y, grad_total, x, weight, mean, rstd, grad_x, partial, num_rows, num_columns, offset,
    g_middle, g_inner, g_outer_stride, g_middle_stride, g_inner_stride,
    x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride,
    CENTRED: tl.constexpr, ADDED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows at a time, twice over their columns: the second reading comes from the cache, where the partial sums stay as well."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    for first_row in range(program * ROWS, num_rows, programs * ROWS):
        rows = first_row + tl.arange(0, ROWS)
        g_starts = row_starts(rows, g_middle, g_inner, g_outer_stride, g_middle_stride, g_inner_stride)
        x_starts = row_starts(rows, x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride)
        rstd_R = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
        mean_R = tl.zeros((ROWS,), dtype=tl.float32)
        if CENTRED:
            mean_R = tl.load(mean + rows, mask=rows < num_rows, other=0.0)
        along_RD = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        sum_RD = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for first in tl.range(0, num_columns, BLOCK, num_stages=STAGES):
            columns = first + tl.arange(0, BLOCK)
            inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
            n_RD = tl.load(x + x_starts[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            g_RD = tl.load(grad_y + g_starts[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                weight_D = tl.load(weight + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
                g_RD = g_RD * (weight_D + offset)[None, :]
            along_RD += g_RD * (n_RD - mean_R[:, None])
            if CENTRED:
                sum_RD += g_RD
        along_R = tl.sum(along_RD, axis=1) * rstd_R / num_columns
        sum_R = tl.sum(sum_RD, axis=1) / num_columns
        for first in tl.range(0, num_columns, BLOCK, num_stages=STAGES):
            columns = first + tl.arange(0, BLOCK)
            here = columns < num_columns
            inside = (rows < num_rows)[:, None] & here[None, :]
            places = (rows.to(tl.int64) * num_columns)[:, None] + columns[None, :]
            n_RD = tl.load(x + x_starts[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            n_RD = (n_RD - mean_R[:, None]) * rstd_R[:, None]
            g_RD = tl.load(grad_y + g_starts[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            own = partial + program.to(tl.int64) * num_columns + columns
            if HAS_WEIGHT:
                tl.store(own, tl.load(own, mask=here, other=0.0) + tl.sum(g_RD * n_RD, axis=0), mask=here)
            if HAS_BIAS:
                bias = own + programs.to(tl.int64) * num_columns
                tl.store(bias, tl.load(bias, mask=here, other=0.0) + tl.sum(g_RD, axis=0), mask=here)
            if HAS_WEIGHT:
                weight_D = tl.load(weight + columns, mask=here, other=0.0).to(tl.float32)
                g_RD = g_RD * (weight_D + offset)[None, :]
            grad_RD = (g_RD - sum_R[:, None] - n_RD * along_R[:, None]) * rstd_R[:, None]
            if ADDED:
                grad_RD += tl.load(grad_total + places, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_x + places, grad_RD.to(grad_x.dtype.element_ty), mask=inside)
        tl.debug_barrier()


@triton.jit
def sum_kernel(partial, weight, bias, num_parts, num_columns, first_sum, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The programs' sums, added up in their order: number 0 of the weight's gradient, number 1 of the bias's."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = columns < num_columns
    which = tl.program_id(1) + first_sum
    start = which.to(tl.int64) * num_parts * num_columns
    sum_RD = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, num_parts, ROWS):
        rows = first + tl.arange(0, ROWS)
        places = start + (rows.to(tl.int64) * num_columns)[:, None] + columns[None, :]
        sum_RD += tl.load(partial + places, mask=(rows < num_parts)[:, None] & here[None, :], other=0.0)
    sum_D = tl.sum(sum_RD, axis=0)
    if which == 0:
        tl.store(weight + columns, sum_D.to(weight.dtype.element_ty), mask=here)
    else:
        tl.store(bias + columns, sum_D.to(bias.dtype.element_ty), mask=here)


SUM_ROWS, SUM_BLOCK, SUM_WARPS = 512, 16, 8
"""All programs' sums are under way at once: the kernel is as long as one reading of memory."""


def launch_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    *,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty where there is none). mean: of layer norms. bias: only its dtype is used."""
    rows, columns = num_rows(x), x.shape[-1]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weight, grad_bias = (torch.empty_like(w) if w is not None else x.new_empty(0) for w in (weight, bias))
    x, x_layout = with_rows(x)
    grad_y, grad_layout = with_rows(grad_y)
    grad_total = None if grad_total is None else grad_total.contiguous()
    loaded_bytes = sum(tensor.element_size() for tensor in (x, grad_y, grad_total) if tensor is not None)
    config = backward_config(rows, columns, loaded_bytes)
    programs = min(config.programs, triton.cdiv(rows, config.rows))
    first_sum, sums = int(weight is None), 1 + int(bias is not None)
    kernel = wide_backward_kernel if config.block < columns else backward_kernel
    new = torch.zeros if kernel is wide_backward_kernel else torch.empty
    partial = new((sums, programs, columns), dtype=torch.float32, device=x.device)
    flags = {"CENTRED": mean is not None, "ADDED": grad_total is not None}
    flags |= {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    tensors = (grad_y, grad_total, x, weight, mean, rstd, grad_x, partial)
    shape = (rows, columns, offset, *grad_layout, *x_layout)
    kernel[(programs,)](
        *tensors, *shape, **flags, ROWS=config.rows, BLOCK=config.block, STAGES=config.stages, num_warps=config.warps
    )
    if sums > first_sum:
        grid = (triton.cdiv(columns, SUM_BLOCK), sums - first_sum)
        outputs = (grad_weight, grad_bias)
        sum_kernel[grid](partial, *outputs, programs, columns, first_sum, SUM_ROWS, SUM_BLOCK, num_warps=SUM_WARPS)
    return grad_x, grad_weight, grad_bias
