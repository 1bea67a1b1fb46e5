"""The norms' backward kernels: rows in registers, and rows too wide for them, which are read for their averages and once more (5 E).

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
from colossal_kernels.row_layout import num_rows, one_a_column, row_starts, with_rows


@triton.jit
def _normal(x, mean, rstd_R, rows, num_rows, inside, CENTRED: tl.constexpr):
    """The normalised rows, 0 outside. x: [R, D] as loaded."""
    n_RD = x.to(tl.float32)
    if CENTRED:
        n_RD = tl.where(inside, n_RD - tl.load(mean + rows, mask=rows < num_rows, other=0.0)[:, None], 0.0)
    return n_RD * rstd_R[:, None]


@triton.jit
def backward_kernel(
    grad_y, grad_total, x, weight, mean, rstd, grad_x, partial, num_rows, num_columns, offset,
    g_middle, g_inner, g_outer_stride, g_middle_stride, g_inner_stride,
    x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride,
    CENTRED: tl.constexpr, ADDED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """TWICE: of a row, registers hold only the sums for the weight; its numbers are read again, from the cache, when its averages are
    known.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    here = columns < num_columns
    grad_weight_RD = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    grad_bias_RD = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if HAS_WEIGHT:
        weights = weight + columns[None, :]
        if not TWICE:  # once: in the loop it would be fetched with every row
            weight_1D = one_a_column(weight, columns, here, ROWS)
    for first in tl.range(program * ROWS, num_rows, programs * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & here[None, :]
        g_starts = row_starts(rows, g_middle, g_inner, g_outer_stride, g_middle_stride, g_inner_stride)
        x_starts = row_starts(rows, x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride)
        x_places, g_places = x_starts[:, None] + columns[None, :], g_starts[:, None] + columns[None, :]
        places = (rows.to(tl.int64) * num_columns)[:, None] + columns[None, :]
        rstd_R = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
        n_RD = tl.load(x + x_places, mask=inside, other=0.0, eviction_policy="evict_last" if TWICE else "")
        n_RD = _normal(n_RD, mean, rstd_R, rows, num_rows, inside, CENTRED)
        g_RD = tl.load(grad_y + g_places, mask=inside, other=0.0, eviction_policy="evict_last" if TWICE else "")
        g_RD = g_RD.to(tl.float32)
        if HAS_BIAS:
            grad_bias_RD += g_RD
        if HAS_WEIGHT:
            grad_weight_RD += g_RD * n_RD
            if TWICE:
                weight_1D = tl.load(weights, mask=here[None, :], other=0.0, eviction_policy="evict_last")
            g_RD = g_RD * (weight_1D.to(tl.float32) + offset)
        along_R = tl.sum(g_RD * n_RD, axis=1) / num_columns
        sum_R = tl.zeros((ROWS,), dtype=tl.float32)
        if CENTRED:
            sum_R = tl.sum(g_RD, axis=1) / num_columns
        if TWICE:
            n_RD = tl.load(x + x_places, mask=inside, other=0.0, eviction_policy="evict_first")
            n_RD = _normal(n_RD, mean, rstd_R, rows, num_rows, inside, CENTRED)
            g_RD = tl.load(grad_y + g_places, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if HAS_WEIGHT:
                weight_1D = tl.load(weights, mask=here[None, :], other=0.0)
                g_RD = g_RD * (weight_1D.to(tl.float32) + offset)
        if CENTRED:
            g_RD = g_RD - sum_R[:, None]
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
def averages_kernel(
    grad_y, x, weight, mean, rstd, averages, num_rows, num_columns, offset,
    g_middle, g_inner, g_outer_stride, g_middle_stride, g_inner_stride,
    x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride,
    CENTRED: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of one wide row avg(g * n), and of layer norms avg(g). averages: [2, num_rows]."""
    row = tl.program_id(0)
    g_start = row_starts(row, g_middle, g_inner, g_outer_stride, g_middle_stride, g_inner_stride)
    x_start = row_starts(row, x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride)
    scale = tl.load(rstd + row)
    centre = 0.0
    if CENTRED:
        centre = tl.load(mean + row)
    along_D = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_D = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in tl.range(0, num_columns, BLOCK, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK)
        here = columns < num_columns
        x_D = tl.load(x + x_start + columns, mask=here, other=0.0).to(tl.float32)
        g_D = tl.load(grad_y + g_start + columns, mask=here, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g_D = g_D * (tl.load(weight + columns, mask=here, other=0.0).to(tl.float32) + offset)
        along_D += g_D * (x_D - centre)
        if CENTRED:
            sum_D += g_D
    tl.store(averages + row, tl.sum(along_D, axis=0) * scale / num_columns)
    if CENTRED:
        tl.store(averages + num_rows + row, tl.sum(sum_D, axis=0) / num_columns)


@triton.jit
def wide_backward_kernel(
    grad_y, grad_total, x, weight, mean, rstd, averages, grad_x, partial, num_rows, num_columns, offset,
    g_middle, g_inner, g_outer_stride, g_middle_stride, g_inner_stride,
    x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride,
    CENTRED: tl.constexpr, ADDED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some columns of wide rows whose averages are known. Programs: blocks of columns x parts of the rows."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part, parts = tl.program_id(1), tl.num_programs(1)
    here = columns < num_columns
    grad_weight_RD = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    grad_bias_RD = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if HAS_WEIGHT:
        weight_1D = one_a_column(weight, columns, here, ROWS)
    for first in tl.range(part * ROWS, num_rows, parts * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        real = rows < num_rows
        inside = real[:, None] & here[None, :]
        g_starts = row_starts(rows, g_middle, g_inner, g_outer_stride, g_middle_stride, g_inner_stride)
        x_starts = row_starts(rows, x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride)
        places = (rows.to(tl.int64) * num_columns)[:, None] + columns[None, :]
        rstd_R = tl.load(rstd + rows, mask=real, other=0.0)
        n_RD = tl.load(x + x_starts[:, None] + columns[None, :], mask=inside, other=0.0)
        n_RD = _normal(n_RD, mean, rstd_R, rows, num_rows, inside, CENTRED)
        g_RD = tl.load(grad_y + g_starts[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            grad_bias_RD += g_RD
        if HAS_WEIGHT:
            grad_weight_RD += g_RD * n_RD
            g_RD = g_RD * (weight_1D.to(tl.float32) + offset)
        if CENTRED:
            g_RD = g_RD - tl.load(averages + num_rows + rows, mask=real, other=0.0)[:, None]
        grad_RD = (g_RD - n_RD * tl.load(averages + rows, mask=real, other=0.0)[:, None]) * rstd_R[:, None]
        if ADDED:
            grad_RD += tl.load(grad_total + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + places, grad_RD.to(grad_x.dtype.element_ty), mask=inside)
    own = partial + part.to(tl.int64) * num_columns + columns
    if HAS_WEIGHT:
        tl.store(own, tl.sum(grad_weight_RD, axis=0), mask=here)
    if HAS_BIAS:
        bias = own + parts.to(tl.int64) * num_columns
        tl.store(bias, tl.sum(grad_bias_RD, axis=0), mask=here)


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
    config = backward_config(columns, loaded_bytes, mean is not None)
    programs = min(config.programs, triton.cdiv(rows, config.rows))
    first_sum, sums = int(weight is None), 1 + int(bias is not None)
    partial = torch.empty((sums, programs, columns), dtype=torch.float32, device=x.device)
    shape = (rows, columns, offset, *grad_layout, *x_layout)
    flags = {"CENTRED": mean is not None, "HAS_WEIGHT": weight is not None}
    more = {"ADDED": grad_total is not None, "HAS_BIAS": bias is not None, "ROWS": config.rows, "BLOCK": config.block}
    loop = {"STAGES": config.stages, "num_warps": config.warps}
    read = (grad_y, grad_total, x, weight, mean, rstd)
    if config.block < columns:
        averages = torch.empty((2, rows), dtype=torch.float32, device=x.device)
        averages_kernel[(rows,)](
            grad_y, x, weight, mean, rstd, averages, *shape, **flags, BLOCK=config.rows * config.block, **loop
        )
        blocks = triton.cdiv(columns, config.block)
        wide_backward_kernel[(blocks, programs)](*read, averages, grad_x, partial, *shape, **flags, **more, **loop)
    else:
        backward_kernel[(programs,)](*read, grad_x, partial, *shape, **flags, **more, **loop, TWICE=config.twice)
    if sums > first_sum:
        grid = (triton.cdiv(columns, SUM_BLOCK), sums - first_sum)
        outputs = (grad_weight, grad_bias)
        sum_kernel[grid](partial, *outputs, programs, columns, first_sum, SUM_ROWS, SUM_BLOCK, num_warps=SUM_WARPS)
    return grad_x, grad_weight, grad_bias
