"""A matrix to fp8 with its scales, and its transpose in the same pass. Least bytes for 8192 x 4096 in bf16: rows and blocks 101 MB (3 bytes
an element), with the transposed copy 134 MB (4); one scale for all needs the largest magnitude first: 5 and 6 bytes an element; rows with
the transposed copy likewise, since a column's largest is known only at its end.

Formula: `colossal_core.ops.low_precision.quantize_fp8`: one exact division a scale, one product an element, so the codes are the
reference's bit for bit. Letters: N rows, D columns, R x C a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops import low_precision as reference
from colossal_core.ops.low_precision import SIDE, SMALLEST, Granularity
from colossal_kernels.builds import Build
from colossal_kernels.fitting import has_fp8, kernels_take
from colossal_kernels.interpreting import interpreted
from colossal_kernels.library import define
from colossal_kernels.low_precision.fp8_blocks import blocks_kernel, squares_kernel
from colossal_kernels.low_precision.fp8_codes import finite_keys, largest_bits, scaled_codes
from colossal_kernels.low_precision.fp8_tiles import factor_and_scale, numbers, places, store_transposed

LARGEST_TILE, LARGEST_WARPS = (64, 128), 4
"""Of programs that look for largest magnitudes: 64 to 96 KiB under way on a multiprocessor."""
LARGEST_PROGRAMS = 528
"""Most of them for one scale of a whole matrix: the four that each of an H200's 132 multiprocessors holds."""
CODES_TILE, CODES_WARPS = (64, 128), 4
"""Of programs that are given the largest magnitudes: 32 elements a thread, 40 to 48 KiB under way on a multiprocessor."""
BLOCK_PART, BLOCK_WARPS = 32, 4
"""Of a tile of 128 by 128, the rows, and for the transposed codes the columns, of one program: few, for more programs a multiprocessor."""
SQUARE_PART, SQUARE_WARPS = 64, 8
"""Rows of a tile of 128 by 128 that are turned to codes at a time, once the whole has been looked through."""
ROW_COLUMNS = 1 << 14
"""Rows up to this long are held in registers by one program each, read once."""
ROW_WARP_ELEMENTS = 1024
"""Elements of a row for each warp: 16 bytes for each thread, four times."""
_FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def quantize_fp8(
    x: Tensor,
    granularity: Granularity = Granularity.TENSOR,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    transposed: bool = False,
) -> tuple[Tensor, ...]:
    """`colossal_core.ops.reference.quantize_fp8`."""
    if x.dim() != 2 or dtype not in _FORMATS or not (kernels_take(x) and has_fp8(x)):
        return reference.quantize_fp8(x, granularity, dtype=dtype, transposed=transposed)
    kind = Granularity(granularity)
    codes, scales, *others = _QUANTIZE(x.detach(), kind.value, dtype, transposed)
    if not transposed:
        return codes, scales
    codes_t, scales_t = others
    if kind in (Granularity.TENSOR, Granularity.TILE):
        scales_t = scales if kind == Granularity.TENSOR else scales.t().contiguous()
    return codes, scales, codes_t, scales_t


@triton.jit
def _largest_kernel(x, largest, row_stride, num_rows, num_columns, ROW: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """largest: zeros, the bits of float32 numbers: of all; ROW: of the rows [N] and, behind them, of the columns [D].

    Bits of numbers that are not negative are ordered as they are, and a largest integer is the same in whatever order it is found.
    """
    if ROW:
        rows_R, columns_C = places(tl.program_id(0), num_columns, R, C)
        x_RC, _ = numbers(x, row_stride, rows_R, columns_C, num_rows, num_columns)
        found_RC = finite_keys(x_RC)
        of_row_R = largest_bits(tl.max(found_RC, axis=1))
        tl.atomic_max(largest + rows_R, of_row_R, mask=rows_R < num_rows, sem="relaxed")
        of_column_C = largest_bits(tl.max(found_RC, axis=0))
        tl.atomic_max(largest + num_rows + columns_C, of_column_C, mask=columns_C < num_columns, sem="relaxed")
    else:
        most_RC = tl.zeros((R, C), dtype=tl.int32)
        num_tiles = tl.cdiv(num_rows, R) * tl.cdiv(num_columns, C)
        tile = tl.program_id(0)
        for _ in range(tl.cdiv(num_tiles - tile, tl.num_programs(0))):
            rows_R, columns_C = places(tile, num_columns, R, C)
            x_RC, _ = numbers(x, row_stride, rows_R, columns_C, num_rows, num_columns)
            most_RC = tl.maximum(most_RC, finite_keys(x_RC))
            tile += tl.num_programs(0)
        tl.atomic_max(largest, largest_bits(tl.max(tl.max(most_RC, axis=1), axis=0)), sem="relaxed")


@triton.jit
def _rows_kernel(
    x, codes, scales, row_stride, num_rows, num_columns,
    MOST: tl.constexpr, SMALLEST: tl.constexpr, E5M2: tl.constexpr, INTERPRETED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Whole rows, a scale for each."""
    rows_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    x_RC, inside_RC = numbers(x, row_stride, rows_R, tl.arange(0, C), num_rows, num_columns)
    factor_R, scale_R = factor_and_scale(largest_bits(tl.max(finite_keys(x_RC), axis=1)), MOST, SMALLEST)
    target_RC = codes + rows_R[:, None] * num_columns + tl.arange(0, C)[None, :]
    tl.store(target_RC, scaled_codes(x_RC, factor_R[:, None], E5M2, INTERPRETED), mask=inside_RC)
    tl.store(scales + rows_R, scale_R, mask=rows_R < num_rows)


@triton.jit
def _codes_kernel(
    x, largest, codes, scales, codes_t, scales_t, row_stride, num_rows, num_columns,
    MOST: tl.constexpr, SMALLEST: tl.constexpr, E5M2: tl.constexpr, INTERPRETED: tl.constexpr,
    ROW: tl.constexpr, TRANSPOSED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile whose largest magnitudes are known: as `_largest_kernel` writes them. The last tile first: it was read last, and may still lie
    in the cache.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    rows_R, columns_C = places(tile, num_columns, R, C)
    x_RC, inside_RC = numbers(x, row_stride, rows_R, columns_C, num_rows, num_columns)
    if ROW:
        row_bits_R = tl.load(largest + rows_R, mask=rows_R < num_rows, other=0)
        factor_R, scale_R = factor_and_scale(row_bits_R, MOST, SMALLEST)
        tl.store(scales + rows_R, scale_R, mask=rows_R < tl.where(tile % tl.cdiv(num_columns, C) == 0, num_rows, 0))
    else:
        bits_1 = tl.load(largest + tl.arange(0, 1))
        factor_R, scale_1 = factor_and_scale(bits_1, MOST, SMALLEST)
        tl.store(scales + tl.arange(0, 1), scale_1, mask=tl.arange(0, 1) == tile)
    codes_RC = scaled_codes(x_RC, factor_R[:, None], E5M2, INTERPRETED)
    tl.store(codes + rows_R[:, None] * num_columns + columns_C[None, :], codes_RC, mask=inside_RC)
    if TRANSPOSED:
        if ROW:
            column_bits_C = tl.load(largest + num_rows + columns_C, mask=columns_C < num_columns, other=0)
            factor_C, scale_C = factor_and_scale(column_bits_C, MOST, SMALLEST)
            tl.store(
                scales_t + columns_C, scale_C, mask=columns_C < tl.where(tile < tl.cdiv(num_columns, C), num_columns, 0)
            )
            codes_RC = scaled_codes(x_RC, factor_C[None, :], E5M2, INTERPRETED)
        store_transposed(codes_t, codes_RC, rows_R, columns_C, num_rows, num_columns)


def _row_tile(num_columns: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program that holds whole rows."""
    columns = triton.next_power_of_2(num_columns)
    rows = max(2048 // columns, 1)
    return rows, columns, min(max(rows * columns // ROW_WARP_ELEMENTS, 1), 16)


def _quantize(x: Tensor, granularity: str, dtype: torch.dtype, transposed: bool) -> list[Tensor]:
    x_ND = x if x.stride(1) == 1 else x.contiguous()
    num_rows, num_columns = x.shape
    made = _quantize_fake(x, granularity, dtype, transposed)
    codes, scales = made[0].view(torch.uint8), made[1]
    codes_t, scales_t = (made[2].view(torch.uint8), made[3]) if transposed else (codes, scales)
    formats = (float(torch.finfo(dtype).max), SMALLEST, dtype == torch.float8_e5m2, interpreted())
    sizes = (x_ND.stride(0), num_rows, num_columns)
    squares = triton.cdiv(num_rows, SIDE) * triton.cdiv(num_columns, SIDE)
    if granularity == "1x128":
        fours = transposed and num_rows % 4 == 0
        blocks_kernel[(squares * (SIDE // BLOCK_PART),)](
            x_ND, codes, scales, codes_t.view(torch.int32) if fours else codes_t, scales_t, *sizes, *formats,
            transposed, fours, SIDE, BLOCK_PART, num_warps=BLOCK_WARPS,
        )  # fmt: skip
    elif granularity == "128x128":
        squares_kernel[(squares,)](
            x_ND, codes, scales, codes_t, *sizes, *formats, transposed, SIDE, SQUARE_PART, num_warps=SQUARE_WARPS
        )
    elif granularity == "row" and not transposed and num_columns <= ROW_COLUMNS:
        rows, columns, warps = _row_tile(num_columns)
        grid = (triton.cdiv(num_rows, rows),)
        _rows_kernel[grid](x_ND, codes, scales, *sizes, *formats, rows, columns, num_warps=warps)
    else:
        largest = _largest(x_ND, by_row=granularity == "row")
        rows, columns = CODES_TILE
        _codes_kernel[(triton.cdiv(num_rows, rows) * triton.cdiv(num_columns, columns),)](
            x_ND, largest, codes, scales, codes_t, scales_t, *sizes, *formats,
            granularity == "row", transposed, rows, columns, num_warps=CODES_WARPS,
        )  # fmt: skip
    return made


def _largest(x_ND: Tensor, *, by_row: bool) -> Tensor:
    """What `_largest_kernel` writes."""
    num_rows, num_columns = x_ND.shape
    rows, columns = LARGEST_TILE
    programs = triton.cdiv(num_rows, rows) * triton.cdiv(num_columns, columns)
    largest = torch.zeros(num_rows + num_columns if by_row else 1, dtype=torch.int32, device=x_ND.device)
    _largest_kernel[(programs if by_row else min(programs, LARGEST_PROGRAMS),)](
        x_ND, largest, x_ND.stride(0), num_rows, num_columns, by_row, rows, columns, num_warps=LARGEST_WARPS
    )
    return largest


def _quantize_fake(x: Tensor, granularity: str, dtype: torch.dtype, transposed: bool) -> list[Tensor]:
    made = [x.new_empty(x.shape, dtype=dtype), _scales(x, granularity, x.shape[0], x.shape[1])]
    if transposed:
        made += [x.new_empty((x.shape[1], x.shape[0]), dtype=dtype), _scales(x, granularity, x.shape[1], x.shape[0])]
    return made


def _scales(x: Tensor, granularity: str, num_rows: int, num_columns: int) -> Tensor:
    across, down = -(-num_columns // SIDE), -(-num_rows // SIDE)
    if granularity == "1x128":
        return x.new_empty((across, num_rows), dtype=torch.float32).t()
    shape = {"tensor": (), "row": (num_rows, 1), "128x128": (down, across)}[granularity]
    return x.new_empty(shape, dtype=torch.float32)


_QUANTIZE = define(
    "quantize_fp8(Tensor x, str granularity, ScalarType dtype, bool transposed) -> Tensor[]", _quantize, _quantize_fake
)


def builds() -> tuple[Build, ...]:
    """Activations and weights of a model with 4096 features in bf16."""
    types = {"x": "*bf16", "codes": "*u8", "codes_t": "*u8", "largest": "*i32", "scales": "*fp32", "scales_t": "*fp32"}
    types |= dict.fromkeys(("row_stride", "num_rows", "num_columns"), "i32")
    aligned = ("row_stride", "num_rows", "num_columns")
    constants = {"MOST": 448.0, "SMALLEST": SMALLEST, "E5M2": False, "INTERPRETED": False}
    row_rows, row_columns, row_warps = _row_tile(4096)
    whole = {**constants, "R": row_rows, "C": row_columns}
    found = [Build("quantize_fp8 rows", _rows_kernel, types, whole, row_warps, aligned=aligned)]
    turned = {**constants, "TRANSPOSED": True}
    for name, row in (("tensor", False), ("row", True)):
        looked = {"ROW": row, "R": LARGEST_TILE[0], "C": LARGEST_TILE[1]}
        made = {**turned, "ROW": row, "R": CODES_TILE[0], "C": CODES_TILE[1]}
        found += [
            Build(f"quantize_fp8 {name} largest", _largest_kernel, types, looked, LARGEST_WARPS, aligned=aligned),
            Build(f"quantize_fp8 {name} and transposed", _codes_kernel, types, made, CODES_WARPS, aligned=aligned),
        ]
    blocks, squares = ({**turned, "SIDE": SIDE, "PART": part} for part in (BLOCK_PART, SQUARE_PART))
    fours = {**types, "codes_t": "*i32"}, {**blocks, "FOURS": True}
    found += [
        Build("quantize_fp8 1x128 and transposed", blocks_kernel, *fours, BLOCK_WARPS, aligned=aligned),
        Build("quantize_fp8 128x128 and transposed", squares_kernel, types, squares, SQUARE_WARPS, aligned=aligned),
    ]
    return tuple(found)
