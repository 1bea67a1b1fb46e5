"""Kernels of `quantize_fp8` whose scales are found within a tile of 128 by 128 (SIDE): blocks of a row, and the whole tile. Memory is read
once and written twice, 4 bytes an element in bf16; what is read again comes from the cache.

Letters: N rows, D columns, R x C a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from colossal_kernels.low_precision.fp8_codes import finite_keys, largest_bits, scaled_codes
from colossal_kernels.low_precision.fp8_tiles import factor_and_scale, numbers, places, store_transposed


@triton.jit
def blocks_kernel(
    x, codes, scales, codes_t, scales_t, row_stride, num_rows, num_columns,
    MOST: tl.constexpr, SMALLEST: tl.constexpr, E5M2: tl.constexpr, INTERPRETED: tl.constexpr,
    TRANSPOSED: tl.constexpr, FOURS: tl.constexpr, SIDE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Of a tile SIDE x SIDE, PART rows; and TRANSPOSED as many columns, which are read again, from the cache: one that held the whole tile
    would be alone on its multiprocessor, and nothing would be read while it writes. FOURS: four rows are one number of codes_t, so that
    these are what changes threads, and not single bytes.
    """
    tile, part = tl.program_id(0) // (SIDE // PART), tl.program_id(0) % (SIDE // PART)
    across = tl.cdiv(num_columns, SIDE)
    down, right = (tile // across).to(tl.int64), (tile % across).to(tl.int64)
    rows_R, columns_C = down * SIDE + part * PART + tl.arange(0, PART), right * SIDE + tl.arange(0, SIDE)
    x_RC, inside_RC = numbers(x, row_stride, rows_R, columns_C, num_rows, num_columns)
    factor_R, scale_R = factor_and_scale(largest_bits(tl.max(finite_keys(x_RC), axis=1)), MOST, SMALLEST)
    tl.store(scales + right * num_rows + rows_R, scale_R, mask=rows_R < num_rows)
    codes_RC = scaled_codes(x_RC, factor_R[:, None], E5M2, INTERPRETED)
    tl.store(codes + rows_R[:, None] * num_columns + columns_C[None, :], codes_RC, mask=inside_RC)
    if TRANSPOSED:
        columns_C = right * SIDE + part * PART + tl.arange(0, PART)
        fours_R = down * (SIDE // 4) + tl.arange(0, SIDE // 4)
        rows_R = 4 * fours_R
        a_RC, _ = numbers(x, row_stride, rows_R, columns_C, num_rows, num_columns)
        b_RC, _ = numbers(x, row_stride, rows_R + 1, columns_C, num_rows, num_columns)
        c_RC, _ = numbers(x, row_stride, rows_R + 2, columns_C, num_rows, num_columns)
        d_RC, _ = numbers(x, row_stride, rows_R + 3, columns_C, num_rows, num_columns)
        ab_RC = tl.maximum(finite_keys(a_RC), finite_keys(b_RC))
        key_C = tl.max(tl.maximum(ab_RC, tl.maximum(finite_keys(c_RC), finite_keys(d_RC))), axis=0)
        factor_C, scale_C = factor_and_scale(largest_bits(key_C), MOST, SMALLEST)
        tl.store(scales_t + down * num_columns + columns_C, scale_C, mask=columns_C < num_columns)
        a_RC = scaled_codes(a_RC, factor_C[None, :], E5M2, INTERPRETED)
        b_RC = scaled_codes(b_RC, factor_C[None, :], E5M2, INTERPRETED)
        c_RC = scaled_codes(c_RC, factor_C[None, :], E5M2, INTERPRETED)
        d_RC = scaled_codes(d_RC, factor_C[None, :], E5M2, INTERPRETED)
        if FOURS:
            ab_RC = a_RC.to(tl.int32) | (b_RC.to(tl.int32) << 8)
            abcd_RC = ab_RC | (c_RC.to(tl.int32) << 16) | (d_RC.to(tl.int32) << 24)
            store_transposed(codes_t, abcd_RC, fours_R, columns_C, num_rows // 4, num_columns)
        else:
            store_transposed(codes_t, a_RC, rows_R, columns_C, num_rows, num_columns)
            store_transposed(codes_t, b_RC, rows_R + 1, columns_C, num_rows, num_columns)
            store_transposed(codes_t, c_RC, rows_R + 2, columns_C, num_rows, num_columns)
            store_transposed(codes_t, d_RC, rows_R + 3, columns_C, num_rows, num_columns)


@triton.jit
def squares_kernel(
    x, codes, scales, codes_t, row_stride, num_rows, num_columns,
    MOST: tl.constexpr, SMALLEST: tl.constexpr, E5M2: tl.constexpr, INTERPRETED: tl.constexpr,
    TRANSPOSED: tl.constexpr, SIDE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """A tile SIDE x SIDE, read for its largest and again, PART rows at a time and from the cache, for its codes."""
    tile = tl.program_id(0)
    rows_R, columns_C = places(tile, num_columns, SIDE, SIDE)
    x_RC, _ = numbers(x, row_stride, rows_R, columns_C, num_rows, num_columns)
    bits = largest_bits(tl.max(tl.max(finite_keys(x_RC), axis=1), axis=0))
    factor_1, scale_1 = factor_and_scale(tl.zeros((1,), dtype=tl.int32) + bits, MOST, SMALLEST)
    tl.store(scales + tile + tl.arange(0, 1), scale_1)
    for part in tl.static_range(SIDE // PART):
        rows_R = (tile // tl.cdiv(num_columns, SIDE)).to(tl.int64) * SIDE + part * PART + tl.arange(0, PART)
        x_RC, inside_RC = numbers(x, row_stride, rows_R, columns_C, num_rows, num_columns)
        codes_RC = scaled_codes(x_RC, factor_1[:, None], E5M2, INTERPRETED)
        tl.store(codes + rows_R[:, None] * num_columns + columns_C[None, :], codes_RC, mask=inside_RC)
        if TRANSPOSED:
            store_transposed(codes_t, codes_RC, rows_R, columns_C, num_rows, num_columns)
