"""`act(gate) * up` for every gate: the kernels.

`silu`: `s = g sigmoid(alpha g)`, `s' = sigmoid(alpha g) (1 + alpha g (1 - sigmoid(alpha g)))`; `gelu`: `s = g Phi(g)`,
`s' = Phi(g) + g phi(g)`; `gelu_tanh`: `s = g sigmoid(2 v)`, `v = sqrt(2 / pi) (g + 0.044715 g^3)`, `s' = sigmoid(2 v) (1 + 2 g v' (1 -
sigmoid(2 v)))`. `y = w s (up + shift)`, so `grad_gate = w s' (up + shift) grad_y`, `grad_up = w s grad_y`, `grad_w` the row's sum of
`s (up + shift) grad_y`. Legend: R rows of a tile, F features of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from colossal_kernels.row_layout import row_starts

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)
ONE_OVER_ROOT_TWO_PI = tl.constexpr(0.3989422804014327)


@dataclass(frozen=True)
class GateConfig:
    """rows, columns: of a tile. warps: of a program."""

    rows: int
    columns: int
    warps: int


TILE = 2048


def forward_config(num_columns: int) -> GateConfig:
    """Tiles that waste few columns of a width that is no power of two (14336, 768), each number of a row by itself.

    None is smaller than a program has threads, backward too: a second thread for a number would read it again where another has already
    put its gradient, and the weights' gradient sums over both.
    """
    columns = min(triton.next_power_of_2(num_columns), 2048)
    while columns > 128 and (-num_columns) % columns > num_columns // 16:
        columns //= 2
    return GateConfig(max(TILE // max(columns, 8), 1), columns, 4)


def backward_config(num_columns: int, interleaved: bool) -> GateConfig:
    """The same, with more registers for each number. interleaved: a thread has four pairs, as one access brings them, so that no numbers
    are exchanged among threads.
    """
    found = forward_config(num_columns)
    rows, columns = max(found.rows // 2, 1), min(found.columns, 1024)
    return GateConfig(rows, columns, min(8 if interleaved else 4, rows * columns // 32))


@triton.jit
def _activated(g, alpha, KIND: tl.constexpr):
    """The activation and its derivative."""
    if KIND == "silu":
        sigmoid = tl.sigmoid(alpha * g)
        return g * sigmoid, sigmoid + alpha * g * sigmoid * (1.0 - sigmoid)
    if KIND == "gelu":
        below = 0.5 + 0.5 * tl.erf(g * ROOT_HALF)
        return g * below, below + g * ONE_OVER_ROOT_TWO_PI * tl.exp(-0.5 * g * g)
    v = ROOT_TWO_OVER_PI * (g + 0.044715 * g * g * g)
    slope = ROOT_TWO_OVER_PI * (1.0 + 3.0 * 0.044715 * g * g)
    sigmoid = tl.sigmoid(2.0 * v)
    return g * sigmoid, sigmoid + 2.0 * g * sigmoid * (1.0 - sigmoid) * slope


@triton.jit
def _columns(num_columns, COLUMNS: tl.constexpr):
    """First row tile and first column of a program: columns go fastest."""
    tiles = tl.cdiv(num_columns, COLUMNS)
    return tl.program_id(0) // tiles, (tl.program_id(0) % tiles).to(tl.int64) * COLUMNS


@triton.jit
def _read(
    gate, up, starts, first, here, num_columns, limit,
    INTERLEAVED: tl.constexpr, CLAMPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """gate and up [R, F] in float32 as they enter the product, and where their clamps let a gradient pass."""
    if INTERLEAVED:
        pair = tl.arange(0, 2 * COLUMNS)
        inside = here[:, None] & (pair < 2 * (num_columns - first))[None, :]
        both = tl.load(gate + (starts + 2 * first)[:, None] + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        g_RF, u_RF = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
    else:
        column = tl.arange(0, COLUMNS)
        inside = here[:, None] & (column < num_columns - first)[None, :]
        places = (starts + first)[:, None] + column[None, :]
        g_RF = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
        u_RF = tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
    g_pass, u_pass = g_RF == g_RF, u_RF == u_RF
    if CLAMPED:
        g_pass, u_pass = g_RF <= limit, (u_RF <= limit) & (u_RF >= -limit)
        g_RF = tl.where(g_RF > limit, limit, g_RF)
        u_RF = tl.where(u_RF > limit, limit, tl.where(u_RF < -limit, -limit, u_RF))
    return g_RF, u_RF, g_pass, u_pass


@triton.jit
def forward_kernel(
    gate, up, weights, y, num_rows, num_columns, alpha, limit, shift,
    x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride,
    KIND: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMPED: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile, first = _columns(num_columns, COLUMNS)
    rows = tile * ROWS + tl.arange(0, ROWS)
    here = rows < num_rows
    starts = row_starts(rows, x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride)
    g_RF, u_RF, _, _ = _read(gate, up, starts, first, here, num_columns, limit, INTERLEAVED, CLAMPED, ROWS, COLUMNS)
    s_RF, _ = _activated(g_RF, alpha, KIND)
    y_RF = s_RF * (u_RF + shift)
    if WEIGHTED:
        y_RF = y_RF * tl.load(weights + rows, mask=here, other=0.0).to(tl.float32)[:, None]
    column = tl.arange(0, COLUMNS)
    places = (rows.to(tl.int64) * num_columns + first)[:, None] + column[None, :]
    inside = here[:, None] & (column < num_columns - first)[None, :]
    tl.store(y + places, y_RF.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_y, gate, up, weights, grad_gate, grad_up, grad_weights, num_rows, num_columns, alpha, limit, shift,
    g_middle, g_inner, g_outer_stride, g_middle_stride, g_inner_stride,
    x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride,
    o_middle, o_inner, o_outer_stride, o_middle_stride, o_inner_stride,
    KIND: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMPED: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile; where rows are weighted, all tiles of its rows, for their sums."""
    tile, start = _columns(tl.where(WEIGHTED, 1, num_columns), COLUMNS)
    rows = tile * ROWS + tl.arange(0, ROWS)
    here = rows < num_rows
    g_starts = row_starts(rows, g_middle, g_inner, g_outer_stride, g_middle_stride, g_inner_stride)
    x_starts = row_starts(rows, x_middle, x_inner, x_outer_stride, x_middle_stride, x_inner_stride)
    o_starts = row_starts(rows, o_middle, o_inner, o_outer_stride, o_middle_stride, o_inner_stride)
    column = tl.arange(0, COLUMNS)
    sum_RF = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    weight_R = tl.zeros((ROWS,), dtype=tl.float32) + 1.0
    if WEIGHTED:
        weight_R = tl.load(weights + rows, mask=here, other=0.0).to(tl.float32)
    first = start
    for _ in range(tl.cdiv(num_columns, COLUMNS) if WEIGHTED else 1):
        inside = here[:, None] & (column < num_columns - first)[None, :]
        grad_RF = tl.load(grad_y + (g_starts + first)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        g_RF, u_RF, g_pass, u_pass = _read(
            gate, up, x_starts, first, here, num_columns, limit, INTERLEAVED, CLAMPED, ROWS, COLUMNS
        )
        s_RF, slope_RF = _activated(g_RF, alpha, KIND)
        u_RF = u_RF + shift
        if WEIGHTED:
            sum_RF += grad_RF * s_RF * u_RF
            grad_RF = grad_RF * weight_R[:, None]
        grad_gate_RF = grad_RF * slope_RF * u_RF
        grad_up_RF = grad_RF * s_RF
        if CLAMPED:
            grad_gate_RF = tl.where(g_pass, grad_gate_RF, 0.0)
            grad_up_RF = tl.where(u_pass, grad_up_RF, 0.0)
        grad_gate_RF = grad_gate_RF.to(grad_gate.dtype.element_ty)
        grad_up_RF = grad_up_RF.to(grad_gate.dtype.element_ty)
        if INTERLEAVED:
            pair = tl.arange(0, 2 * COLUMNS)
            both = tl.reshape(tl.join(grad_gate_RF, grad_up_RF), (ROWS, 2 * COLUMNS))
            within = here[:, None] & (pair < 2 * (num_columns - first))[None, :]
            tl.store(grad_gate + (o_starts + 2 * first)[:, None] + pair[None, :], both, mask=within)
        else:
            places = (o_starts + first)[:, None] + column[None, :]
            tl.store(grad_gate + places, grad_gate_RF, mask=inside)
            tl.store(grad_up + places, grad_up_RF, mask=inside)
        first += COLUMNS
    if WEIGHTED:
        sum_R = tl.sum(sum_RF, axis=1)
        tl.store(grad_weights + rows, sum_R.to(grad_weights.dtype.element_ty), mask=here)
