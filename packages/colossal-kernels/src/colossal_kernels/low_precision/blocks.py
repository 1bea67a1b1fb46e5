"""Blocks of a flat tensor in 8 bits, and the sum of several such: one read, one write. n numbers in bf16, blocks of 256: 3.016 n bytes to
quantize; P parts into float32: (1.016 P + 4) n bytes.

Formulas: `colossal_core.ops.low_precision`. Sums are taken in float32 in the order of the parts: the same bits in every run and on every
rank (product and sum are rounded each by itself, as in the reference). Letters: B numbers of a block (`B2` the next power of two), R
blocks of a program, P parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops import low_precision as reference
from colossal_core.ops.low_precision import SMALLEST
from colossal_core.rounding import BLOCK
from colossal_kernels.builds import Build
from colossal_kernels.fitting import kernels_take
from colossal_kernels.interpreting import interpreted
from colossal_kernels.library import define
from colossal_kernels.low_precision.fp8_codes import fp8_codes

TILE_ELEMENTS, TILE_WARPS = 4096, 4
"""Numbers of one program that quantizes."""
SUM_TILES, SUM_WARPS = 2, 8
"""Tiles of one program that sums, of four numbers for each thread: 4 bytes of codes and 16 of sums, so that none change threads."""
SUM_MANY = 1 << 13
"""Of fewer tiles each has a program of its own."""
MOST_AT_ONCE = 8
"""Parts that are read before any is summed."""
MOST_BLOCK = 1 << 13
_FORMATS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def quantize_blocks(x: Tensor, *, block: int = BLOCK, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """`colossal_core.ops.reference.quantize_blocks`, the same bits."""
    if dtype not in _FORMATS or block > MOST_BLOCK or not kernels_take(x):
        return reference.quantize_blocks(x, block=block, dtype=dtype)
    codes, scales = _QUANTIZE(x.detach(), block, dtype)
    return codes, scales


def dequantize_blocks_sum(
    codes: Tensor, scales: Tensor, *, block: int = BLOCK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`colossal_core.ops.reference.dequantize_blocks_sum`, the same bits."""
    fitting = len(codes) == len(scales) and scales.shape[1] == -(-codes.shape[1] // block) and codes.dtype in _FORMATS
    if not fitting or dtype == torch.float64 or block > MOST_BLOCK or not kernels_take(scales):
        return reference.dequantize_blocks_sum(codes, scales, block=block, dtype=dtype)
    total: Tensor = _SUM(codes.detach(), scales.detach(), block, dtype)
    return total


@triton.jit
def _quantize_kernel(
    x, codes, scales, num_elements, num_blocks, block,
    INT8: tl.constexpr, MOST: tl.constexpr, SMALLEST: tl.constexpr, E5M2: tl.constexpr, INTERPRETED: tl.constexpr,
    R: tl.constexpr, B2: tl.constexpr,
):  # fmt: skip
    blocks_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    places_B = tl.arange(0, B2)
    places_RB = blocks_R[:, None] * block + places_B[None, :]
    inside_RB = (places_B < block)[None, :] & (places_RB < num_elements)
    x_RB = tl.load(x + places_RB, mask=inside_RB, other=0.0).to(tl.float32)
    # Bits of magnitudes are ordered as they are, and those of what is not finite lie above.
    bits_R = tl.max(x_RB.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    finite_R = bits_R < 0x7F800000
    largest_R = tl.maximum(tl.where(finite_R, bits_R, 0).to(tl.float32, bitcast=True), SMALLEST)
    most_R = tl.full((R,), MOST, dtype=tl.float32)
    # No product lies above MOST by more than rounding takes away.
    scaled_RB = tl.where(finite_R[:, None], x_RB, 0.0) * tl.div_rn(most_R, largest_R)[:, None]
    if INT8:
        # The nearest integer, ties to even, in the lowest bits: beside 1.5 * 2^23 a float32 has no fraction.
        codes_RB = (scaled_RB + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8)
    else:
        codes_RB = fp8_codes(scaled_RB, E5M2, INTERPRETED)
    tl.store(codes + places_RB, codes_RB, mask=inside_RB)
    scale_R = tl.where(finite_R, tl.div_rn(largest_R, most_R), float("nan"))
    tl.store(scales + blocks_R, scale_R, mask=blocks_R < num_blocks)


@triton.jit
def _sum_kernel(
    codes, scales, total, part_stride, scale_stride, num_elements, num_blocks, num_parts, block,
    AT_ONCE: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr, B2: tl.constexpr,
):  # fmt: skip
    places_B = tl.arange(0, B2)
    part_stride, scale_stride = tl.cast(part_stride, tl.int64), tl.cast(scale_stride, tl.int64)
    for tile in tl.static_range(TILES):
        blocks_R = (tl.program_id(0).to(tl.int64) * TILES + tile) * R + tl.arange(0, R)
        places_RB = blocks_R[:, None] * block + places_B[None, :]
        inside_RB = (places_B < block)[None, :] & (places_RB < num_elements)
        sum_RB = tl.zeros((R, B2), dtype=tl.float32)
        source_RB, scale_source_R = codes + places_RB, scales + blocks_R
        left_1 = tl.zeros((1,), dtype=tl.int32) + num_parts
        for _ in range(tl.cdiv(num_parts, AT_ONCE)):
            for part in tl.static_range(AT_ONCE):
                there_R = (blocks_R < num_blocks) & (left_1 > part)
                codes_RB = tl.load(source_RB + part * part_stride, mask=inside_RB & there_R[:, None], other=0.0).to(
                    tl.float32
                )
                scale_R = tl.load(scale_source_R + part * scale_stride, mask=there_R, other=0.0)
                sum_RB += codes_RB * scale_R[:, None]
            source_RB += AT_ONCE * part_stride
            scale_source_R += AT_ONCE * scale_stride
            left_1 -= AT_ONCE
        tl.store(total + places_RB, sum_RB.to(total.dtype.element_ty), mask=inside_RB)


def _rows_of(block: int, tile_elements: int) -> tuple[int, int]:
    """R and B2."""
    size = triton.next_power_of_2(block)
    return max(tile_elements // size, 1), size


def _most(dtype: torch.dtype) -> float:
    return 127.0 if dtype == torch.int8 else float(torch.finfo(dtype).max)


def _quantize(x: Tensor, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    flat = x.contiguous()
    codes, scales = _quantize_fake(x, block, dtype)
    rows, size = _rows_of(block, TILE_ELEMENTS)
    _quantize_kernel[(triton.cdiv(len(scales), rows),)](
        flat, codes.view(torch.uint8), scales, x.numel(), len(scales), block,
        dtype == torch.int8, _most(dtype), SMALLEST, dtype == torch.float8_e5m2, interpreted(), rows, size,
        num_warps=TILE_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scales


def _sum(codes: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    codes_PN = codes if codes.stride(1) == 1 else codes.contiguous()
    scales_PB = scales if scales.stride(1) == 1 else scales.contiguous()
    total = _sum_fake(codes, scales, block, dtype)
    rows, size = _rows_of(block, 128 * SUM_WARPS)
    num_blocks = scales.shape[1]
    tiles = SUM_TILES if num_blocks >= rows * SUM_MANY else 1
    _sum_kernel[(triton.cdiv(num_blocks, rows * tiles),)](
        codes_PN, scales_PB, total, codes_PN.stride(0), scales_PB.stride(0), codes.shape[1], num_blocks, len(codes), block,
        min(len(codes), MOST_AT_ONCE), tiles, rows, size, num_warps=SUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return total


def _quantize_fake(x: Tensor, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.numel(), dtype=dtype), x.new_empty(-(-x.numel() // block), dtype=torch.float32)


def _sum_fake(codes: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    del scales, block
    return codes.new_empty(codes.shape[1], dtype=dtype)


_QUANTIZE = define(
    "quantize_blocks(Tensor x, int block, ScalarType dtype) -> (Tensor, Tensor)", _quantize, _quantize_fake
)
_SUM = define(
    "dequantize_blocks_sum(Tensor codes, Tensor scales, int block, ScalarType dtype) -> Tensor", _sum, _sum_fake
)


def builds() -> tuple[Build, ...]:
    """Gradients in bf16 in blocks of 256."""
    types = {
        "x": "*bf16",
        "codes": "*u8",
        "scales": "*fp32",
        "num_elements": "i64",
        "num_blocks": "i32",
        "block": "i32",
    }
    rows, size = _rows_of(BLOCK, TILE_ELEMENTS)
    numbers = {"SMALLEST": SMALLEST, "E5M2": False, "INTERPRETED": False, "R": rows, "B2": size}
    aligned = ("num_elements", "block", "part_stride")
    found = [
        Build(f"quantize_blocks {name}", _quantize_kernel, types, {**numbers, **kind}, TILE_WARPS, aligned=aligned)
        for name, kind in (("int8", {"INT8": True, "MOST": 127.0}), ("fp8", {"INT8": False, "MOST": 448.0}))
    ]
    sums = {"scales": "*fp32", "total": "*fp32", "part_stride": "i64", "scale_stride": "i64", "num_elements": "i64"}
    sums |= {"num_parts": "i32", "num_blocks": "i32", "block": "i32"}
    rows, size = _rows_of(BLOCK, 128 * SUM_WARPS)
    for name, codes, parts in (("int8", "*i8", 4), ("fp8", "*fp8e4nv", 8)):
        kind = {**sums, "codes": codes}
        constants = {"AT_ONCE": parts, "TILES": SUM_TILES, "R": rows, "B2": size}
        found.append(Build(f"dequantize_blocks_sum {name}", _sum_kernel, kind, constants, SUM_WARPS, aligned=aligned))
    return tuple(found)
