"""Products of fp8 matrices by torch's own kernels (cuBLAS): 1.37 to 1.53 PFLOP/s on an H200, 1.8 to 1.9 times bf16; blocks 1.17 to 1.29.

Formula: `colossal_core.ops.low_precision.scaled_matmul`. `torch.nn.functional.scaled_mm` is called alike on torch 2.11 and 2.13; it wants
the scales of blocks column after column and those of tiles padded to four in a row, as read in PyTorch's ScaledBlas.cpp. Blocks and tiles
it takes in e4m3 only; with an operand in e5m2 they are the reference's. So are products that are wanted in float32: tensor cores keep
some 14 bits of a sum of fp8 products (DeepSeek-V3, section 3.3.2), which is more than bf16 and fp16 hold, and less than float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from colossal_core.ops import low_precision as reference
from colossal_core.ops.low_precision import Granularity, Recipe
from colossal_kernels.library import define

ALIGNED = 16
"""Both contracted and outer sizes must be multiples of this, and so must be the byte at which a matrix starts."""


def scaled_matmul(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    recipe: Recipe = Recipe.TENSOR,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`colossal_core.ops.reference.scaled_matmul`. Two e4m3 operands are summed by the tensor cores' faster and coarser accumulation, as is
    usual in forward passes; a gradient in e5m2 is not. torch takes e5m2 in no recipe of blocks: there the reference multiplies in float32,
    as slowly as that is. With a scale for each block a gradient does not need e5m2's range (DeepSeek-V3, section 3.3.2).
    """
    if a.device.type != "cuda":
        return reference.scaled_matmul(a, scale_a, b, scale_b, recipe, dtype=dtype)
    y: Tensor = _PRODUCT(a.detach(), scale_a.detach(), b.detach(), scale_b.detach(), Recipe(recipe).value, dtype)
    return y


def _product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    recipe = Recipe(name)
    if not _fits(a, scale_a, b, scale_b, recipe, dtype):
        return reference.scaled_matmul(a, scale_a, b, scale_b, recipe, dtype=dtype)
    left, right = recipe.granularities()
    fast = a.dtype == b.dtype == torch.float8_e4m3fn and left in (Granularity.TENSOR, Granularity.ROW)
    return F.scaled_mm(
        a,
        b.t(),
        _laid_out(scale_a, left),
        _scaling(left),
        _laid_out(scale_b, right).view(1, -1) if right == Granularity.ROW else _laid_out(scale_b, right),
        _scaling(right),
        output_dtype=dtype,
        use_fast_accum=fast,
    )


def _product_fake(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    del scale_a, scale_b, name
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


_PRODUCT = define(
    "scaled_matmul(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, str recipe, ScalarType dtype) -> Tensor",
    _product,
    _product_fake,
)


def _fits(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, recipe: Recipe, dtype: torch.dtype) -> bool:
    if torch.version.hip is not None or {scale_a.dtype, scale_b.dtype} != {torch.float32}:
        return False
    aligned = a.numel() > 0 and b.numel() > 0 and all(size % ALIGNED == 0 for size in (*a.shape, *b.shape))
    capability = torch.cuda.get_device_capability(a.device)
    blocks = recipe in (Recipe.BLOCK_TILE, Recipe.BLOCK_BLOCK)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    formats = (a.dtype, b.dtype) in ([(e4m3, e4m3)] if blocks else [(e4m3, e4m3), (e5m2, e4m3), (e4m3, e5m2)])
    able = capability[0] == 9 if blocks else capability >= (8, 9)
    narrow = dtype == torch.bfloat16 or (recipe == Recipe.TENSOR and dtype == torch.float16)
    dense = all(codes.is_contiguous() and codes.storage_offset() % ALIGNED == 0 for codes in (a, b))
    return formats and aligned and able and narrow and dense


def _scaling(granularity: Granularity) -> Any:
    kinds = torch.nn.functional.ScalingType
    return {
        Granularity.TENSOR: kinds.TensorWise,
        Granularity.ROW: kinds.RowWise,
        Granularity.BLOCK: kinds.BlockWise1x128,
        Granularity.TILE: kinds.BlockWise128x128,
    }[granularity]


def _laid_out(scales: Tensor, granularity: Granularity) -> Tensor:
    """Blocks: strides (1, N), as `quantize_fp8` makes them. Tiles: [K / 128 rounded up to fours, N / 128], each column by itself."""
    if granularity == Granularity.BLOCK:
        return scales if scales.stride() == (1, len(scales)) else scales.t().contiguous().t()
    if granularity == Granularity.TILE:
        return F.pad(scales, (0, -scales.shape[1] % 4)).contiguous().t()
    return scales.contiguous()
