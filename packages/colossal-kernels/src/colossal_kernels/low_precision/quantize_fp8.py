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
from colossal_kernels.low_precision.fp8_codes import finite_magnitudes, scaled_codes

WARPS = 8
"""Of a program that looks for the largest of tiles of 128 by 128: 64 elements a thread."""
TILE_WARPS = 16
"""Of a program that finds a tile's scales and codes: with 8, blocks and their transpose take 246 registers."""
FREE_SIDE, FREE_WARPS = 64, 4
"""Tile and warps where scales are known beforehand, so that tiles may be smaller: more of them at a time."""
PARTS = 1024
"""Most programs that look for the largest magnitude of a whole matrix."""
ROW_COLUMNS = 1 << 14
"""Rows up to this long are held in registers by one program each, read once."""
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
def _tile(x, row_stride, num_rows, num_columns, tile, SIDE: tl.constexpr):
    """A tile's rows, columns and numbers in float32, zero outside."""
    across = tl.cdiv(num_columns, SIDE)
    rows_R = (tile // across).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    columns_C = (tile % across).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    inside_RC = (rows_R < num_rows)[:, None] & (columns_C < num_columns)[None, :]
    x_RC = tl.load(x + rows_R[:, None] * row_stride + columns_C[None, :], mask=inside_RC, other=0.0)
    return rows_R, columns_C, x_RC.to(tl.float32)


@triton.jit
def _largest_kernel(x, parts, row_stride, num_rows, num_columns, SIDE: tl.constexpr):
    """The largest of a few tiles: parts [programs]."""
    most_RC = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    num_tiles = tl.cdiv(num_rows, SIDE) * tl.cdiv(num_columns, SIDE)
    tile = tl.program_id(0)
    for _ in range(tl.cdiv(num_tiles - tile, tl.num_programs(0))):
        _, _, x_RC = _tile(x, row_stride, num_rows, num_columns, tile, SIDE)
        most_RC = tl.maximum(most_RC, finite_magnitudes(x_RC))
        tile += tl.num_programs(0)
    tl.store(parts + tl.program_id(0), tl.max(tl.max(most_RC, axis=1), axis=0))


@triton.jit
def _both_largest_kernel(x, row_parts, column_parts, row_stride, num_rows, num_columns, SIDE: tl.constexpr):
    """The largest of each row and column of a tile: row_parts [tiles across, N], column_parts [tiles down, D]."""
    tile = tl.program_id(0)
    rows_R, columns_C, x_RC = _tile(x, row_stride, num_rows, num_columns, tile, SIDE)
    across = tl.cdiv(num_columns, SIDE)
    magnitudes_RC = finite_magnitudes(x_RC)
    row_target = row_parts + (tile % across).to(tl.int64) * num_rows + rows_R
    tl.store(row_target, tl.max(magnitudes_RC, axis=1), mask=rows_R < num_rows)
    column_target = column_parts + (tile // across).to(tl.int64) * num_columns + columns_C
    tl.store(column_target, tl.max(magnitudes_RC, axis=0), mask=columns_C < num_columns)


@triton.jit
def _rows_kernel(
    x, codes, scales, row_stride, num_rows, num_columns,
    MOST: tl.constexpr, SMALLEST: tl.constexpr, E5M2: tl.constexpr, INTERPRETED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Whole rows, a scale for each."""
    rows_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    columns_C = tl.arange(0, C)
    inside_RC = (rows_R < num_rows)[:, None] & (columns_C < num_columns)[None, :]
    x_RC = tl.load(x + rows_R[:, None] * row_stride + columns_C[None, :], mask=inside_RC, other=0.0).to(tl.float32)
    largest_R = tl.maximum(tl.max(finite_magnitudes(x_RC), axis=1), SMALLEST)
    factor_R = tl.div_rn(tl.full((R,), MOST, dtype=tl.float32), largest_R)
    target_RC = codes + rows_R[:, None] * num_columns + columns_C[None, :]
    tl.store(target_RC, scaled_codes(x_RC, factor_R[:, None], MOST, E5M2, INTERPRETED), mask=inside_RC)
    scale_R = tl.div_rn(largest_R, tl.full((R,), MOST, dtype=tl.float32))
    tl.store(scales + rows_R, scale_R, mask=rows_R < num_rows)


@triton.jit
def _tiles_kernel(
    x, row_largest, column_largest, codes, scales, codes_t, scales_t, row_stride, num_rows, num_columns, num_parts,
    KIND: tl.constexpr, TRANSPOSED: tl.constexpr, MOST: tl.constexpr, SMALLEST: tl.constexpr, E5M2: tl.constexpr,
    INTERPRETED: tl.constexpr, SIDE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile, read once, and written once or twice.

    row_largest: KIND tensor: [parts]; row: [N]; else of no use. column_largest: KIND row: [D].
    """
    tile = tl.program_id(0)
    rows_R, columns_C, x_RC = _tile(x, row_stride, num_rows, num_columns, tile, SIDE)
    across = tl.cdiv(num_columns, SIDE)
    down, right = tile // across, tile % across
    if KIND == "tensor":
        parts = tl.arange(0, PARTS)
        largest = tl.max(tl.load(row_largest + parts, mask=parts < num_parts, other=0.0), axis=0)
        rows_most_R = tl.zeros((SIDE,), dtype=tl.float32) + largest
    elif KIND == "row":
        rows_most_R = tl.load(row_largest + rows_R, mask=rows_R < num_rows, other=0.0)
    else:
        rows_most_R = tl.max(finite_magnitudes(x_RC), axis=1)
        if KIND == "128x128":
            rows_most_R = tl.zeros((SIDE,), dtype=tl.float32) + tl.max(rows_most_R, axis=0)
    most_R = tl.full((SIDE,), MOST, dtype=tl.float32)
    rows_most_R = tl.maximum(rows_most_R, SMALLEST)
    factor_R = tl.div_rn(most_R, rows_most_R)
    scale_R = tl.div_rn(rows_most_R, most_R)
    codes_RC = scaled_codes(x_RC, factor_R[:, None], MOST, E5M2, INTERPRETED)
    inside_RC = (rows_R < num_rows)[:, None] & (columns_C < num_columns)[None, :]
    tl.store(codes + rows_R[:, None] * num_columns + columns_C[None, :], codes_RC, mask=inside_RC)
    if KIND == "tensor":
        tl.store(scales + tl.arange(0, SIDE), scale_R, mask=tl.arange(0, SIDE) < tl.where(tile == 0, 1, 0))
    elif KIND == "row":
        tl.store(scales + rows_R, scale_R, mask=rows_R < tl.where(right == 0, num_rows, 0))
    elif KIND == "1x128":
        tl.store(scales + right.to(tl.int64) * num_rows + rows_R, scale_R, mask=rows_R < num_rows)
    else:
        tl.store(scales + tile + tl.arange(0, SIDE), scale_R, mask=tl.arange(0, SIDE) < 1)
    if TRANSPOSED:
        if KIND == "row" or KIND == "1x128":
            if KIND == "row":
                columns_most_C = tl.load(column_largest + columns_C, mask=columns_C < num_columns, other=0.0)
                last = tl.where(down == 0, num_columns, 0)
            else:
                columns_most_C = tl.max(finite_magnitudes(x_RC), axis=0)
                last = num_columns
            columns_most_C = tl.maximum(columns_most_C, SMALLEST)
            factor_C = tl.div_rn(tl.full((SIDE,), MOST, dtype=tl.float32), columns_most_C)
            codes_RC = scaled_codes(x_RC, factor_C[None, :], MOST, E5M2, INTERPRETED)
            scale_C = tl.div_rn(columns_most_C, tl.full((SIDE,), MOST, dtype=tl.float32))
            tl.store(scales_t + down.to(tl.int64) * num_columns + columns_C, scale_C, mask=columns_C < last)
        target_CR = codes_t + columns_C[:, None] * num_rows + rows_R[None, :]
        inside_CR = (columns_C < num_columns)[:, None] & (rows_R < num_rows)[None, :]
        tl.store(target_CR, tl.trans(codes_RC), mask=inside_CR)


def _row_tile(num_columns: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program that holds whole rows."""
    columns = triton.next_power_of_2(num_columns)
    return max(2048 // columns, 1), columns, min(max(columns // 512, 4), 16)


def _tile_of(granularity: str) -> tuple[int, int]:
    """Side and warps."""
    return (FREE_SIDE, FREE_WARPS) if granularity in ("tensor", "row") else (SIDE, TILE_WARPS)


def _quantize(x: Tensor, granularity: str, dtype: torch.dtype, transposed: bool) -> list[Tensor]:
    x_ND = x if x.stride(1) == 1 else x.contiguous()
    num_rows, num_columns = x.shape
    made = _quantize_fake(x, granularity, dtype, transposed)
    codes, scales = made[0].view(torch.uint8), made[1]
    codes_t, scales_t = (made[2].view(torch.uint8), made[3]) if transposed else (codes, scales)
    numbers = (float(torch.finfo(dtype).max), SMALLEST, dtype == torch.float8_e5m2, interpreted())
    tiles = triton.cdiv(num_rows, SIDE) * triton.cdiv(num_columns, SIDE)
    sizes = (x_ND.stride(0), num_rows, num_columns)
    if granularity == "row" and not transposed and num_columns <= ROW_COLUMNS:
        rows, columns, warps = _row_tile(num_columns)
        grid = (triton.cdiv(num_rows, rows),)
        _rows_kernel[grid](x_ND, codes, scales, *sizes, *numbers, rows, columns, num_warps=warps)
        return made
    row_largest, column_largest, parts = scales, scales, min(PARTS, tiles)
    if granularity == "tensor":
        row_largest = torch.empty(parts, dtype=torch.float32, device=x.device)
        _largest_kernel[(parts,)](x_ND, row_largest, *sizes, SIDE, num_warps=WARPS)
    elif granularity == "row":
        row_parts = torch.empty(triton.cdiv(num_columns, SIDE), num_rows, dtype=torch.float32, device=x.device)
        column_parts = torch.empty(triton.cdiv(num_rows, SIDE), num_columns, dtype=torch.float32, device=x.device)
        _both_largest_kernel[(tiles,)](x_ND, row_parts, column_parts, *sizes, SIDE, num_warps=WARPS)
        row_largest, column_largest = row_parts.amax(0), column_parts.amax(0)
    side, warps = _tile_of(granularity)
    _tiles_kernel[(triton.cdiv(num_rows, side) * triton.cdiv(num_columns, side),)](
        x_ND, row_largest, column_largest, codes, scales, codes_t, scales_t, *sizes, parts,
        granularity, transposed, *numbers, side, triton.next_power_of_2(parts), num_warps=warps,
    )  # fmt: skip
    return made


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
    types = {"x": "*bf16", "codes": "*u8", "codes_t": "*u8"}
    types |= dict.fromkeys(("scales", "scales_t", "row_largest", "column_largest", "parts"), "*fp32")
    types |= dict.fromkeys(("row_parts", "column_parts"), "*fp32")
    types |= dict.fromkeys(("row_stride", "num_rows", "num_columns", "num_parts"), "i32")
    aligned = ("row_stride", "num_rows", "num_columns")
    numbers = {"MOST": 448.0, "SMALLEST": SMALLEST, "E5M2": False, "INTERPRETED": False}
    tiles = {**numbers, "PARTS": PARTS, "TRANSPOSED": True}
    rows, columns, warps = _row_tile(4096)
    found = [
        Build("quantize_fp8 largest", _largest_kernel, types, {"SIDE": SIDE}, WARPS, aligned=aligned),
        Build("quantize_fp8 largest of both", _both_largest_kernel, types, {"SIDE": SIDE}, WARPS, aligned=aligned),
        Build("quantize_fp8 rows", _rows_kernel, types, {**numbers, "R": rows, "C": columns}, warps, aligned=aligned),
    ]
    for kind in Granularity:
        side, warps = _tile_of(kind)
        constants = {**tiles, "KIND": kind.value, "SIDE": side}
        found.append(
            Build(f"quantize_fp8 {kind} and transposed", _tiles_kernel, types, constants, warps, aligned=aligned)
        )
    return tuple(found)
