"""Tiles of a matrix on their way to fp8: where they lie, their numbers, their factors, and how they are written transposed.

Letters: N rows, D columns, R x C a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(tile, num_columns, R: tl.constexpr, C: tl.constexpr):
    """Rows and columns of a tile, of which there are `cdiv(num_columns, C)` in a row."""
    across = tl.cdiv(num_columns, C)
    return (tile // across).to(tl.int64) * R + tl.arange(0, R), (tile % across).to(tl.int64) * C + tl.arange(0, C)


@triton.jit
def numbers(x, row_stride, rows_R, columns_C, num_rows, num_columns):
    """In float32, zero outside; and which are inside."""
    inside_RC = (rows_R < num_rows)[:, None] & (columns_C < num_columns)[None, :]
    x_RC = tl.load(x + rows_R[:, None] * row_stride + columns_C[None, :], mask=inside_RC, other=0.0)
    return x_RC.to(tl.float32), inside_RC


@triton.jit
def factor_and_scale(bits_R, MOST: tl.constexpr, SMALLEST: tl.constexpr):
    """Each by one exact division. bits_R: of the largest magnitude."""
    largest_R = tl.maximum(bits_R.to(tl.float32, bitcast=True), SMALLEST)
    most_R = tl.full(largest_R.shape, MOST, dtype=tl.float32)
    return tl.div_rn(most_R, largest_R), tl.div_rn(largest_R, most_R)


@triton.jit
def store_transposed(codes_t, codes_RC, rows_R, columns_C, num_rows, num_columns):
    inside_CR = (columns_C < num_columns)[:, None] & (rows_R < num_rows)[None, :]
    tl.store(codes_t + columns_C[:, None] * num_rows + rows_R[None, :], tl.trans(codes_RC), mask=inside_CR)
