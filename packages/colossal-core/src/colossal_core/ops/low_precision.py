"""Reference operations in 8 bits: matrices in fp8 with their scales, their product, and flat blocks for communication.

Letters: N and M rows, D and K columns, B blocks, P parts. A scale is what a code is multiplied by to give the number back.
"""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F

from colossal_core.ops.norms import statistics_dtype
from colossal_core.rounding import BLOCK

SIDE = 128
"""Length of a block of columns, and side of a square tile: what products on an H100 and later take (DeepSeek-V3, section 3.3)."""
SMALLEST = 2.0**-100
"""A largest magnitude is taken for at least this, so that zeros have a scale that can be divided by."""


class Granularity(StrEnum):
    """Which elements of a matrix share a scale, with the scales' shape for a matrix [N, D].

    TENSOR: all, []. ROW: a row, [N, 1]. BLOCK: 128 neighbours in a row, [N, ceil(D / 128)], stored column after column. TILE: a square of
    128 by 128, [ceil(N / 128), ceil(D / 128)].
    """

    TENSOR = "tensor"
    ROW = "row"
    BLOCK = "1x128"
    TILE = "128x128"


class Recipe(StrEnum):
    """How the two operands of a product are scaled: left by right."""

    TENSOR = "tensor"
    ROW = "row"
    BLOCK_TILE = "1x128 by 128x128"
    BLOCK_BLOCK = "1x128 by 1x128"

    def granularities(self) -> tuple[Granularity, Granularity]:
        left, _, right = self.value.partition(" by ")
        return Granularity(left), Granularity(right or left)


def quantize_fp8(
    x: torch.Tensor,
    granularity: Granularity = Granularity.TENSOR,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    transposed: bool = False,
) -> tuple[torch.Tensor, ...]:
    """A matrix in fp8: `codes = round(x * (most / a))`, `scales = a / most`, a the largest finite magnitude of those that share a scale and
    `most` the largest number of the format (Micikevicius et al. 2022; blocks: DeepSeek-V3).

    x: [N, D]; dtype: float8_e4m3fn (448) or float8_e5m2 (57344). Returns codes [N, D] and scales as `Granularity` says, float32 (float64
    for float64). transposed: then also the codes [D, N], contiguous, and the scales of `x.t()` in the same granularity, each as if it had
    been quantized by itself: what the backward products of a linear layer take. What is not finite becomes NaN and changes no scale;
    zeros stay zeros. Not differentiable.
    """
    granularity = Granularity(granularity)
    wide = x.detach().to(statistics_dtype(x.dtype))
    both = (wide, wide.t()) if transposed else (wide,)
    return tuple(tensor for matrix in both for tensor in _quantized(matrix, granularity, dtype))


def _quantized(wide: torch.Tensor, granularity: Granularity, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    most = torch.finfo(dtype).max
    finite = wide.isfinite()
    largest = _largest(wide.abs().where(finite, 0.0), granularity).clamp_(min=SMALLEST)
    factors, scales = _both_ways(most, largest)
    scaled = wide * expanded(factors, granularity, wide.shape)
    codes = scaled.clamp(-most, most).where(finite, torch.nan).to(dtype).contiguous()
    return codes, scales.t().contiguous().t() if granularity == Granularity.BLOCK else scales


def _both_ways(most: float, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`most / largest` and `largest / most`, rounded once: torch divides by a number, and a number by a tensor, through a reciprocal."""
    mosts = torch.full_like(largest, most)
    return mosts / largest, largest / mosts


def _largest(magnitudes: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """The largest of each group, in the scales' shape."""
    if granularity == Granularity.TENSOR:
        return magnitudes.amax() if magnitudes.numel() else magnitudes.new_zeros(())
    if granularity == Granularity.ROW:
        return magnitudes.amax(1, keepdim=True) if magnitudes.shape[1] else magnitudes.new_zeros(len(magnitudes), 1)
    rows = SIDE if granularity == Granularity.TILE else 1
    padded = F.pad(magnitudes, (0, -magnitudes.shape[1] % SIDE, 0, -magnitudes.shape[0] % rows))
    tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // SIDE, SIDE)
    return tiles.amax((1, 3)) if tiles.numel() else tiles.new_zeros(tiles.shape[0], tiles.shape[2])


def expanded(scales: torch.Tensor, granularity: Granularity, shape: torch.Size) -> torch.Tensor:
    """Scales as a factor for each element of a matrix of this shape."""
    if granularity in (Granularity.TENSOR, Granularity.ROW):
        return scales
    wide = scales.repeat_interleave(SIDE, dim=1)[:, : shape[1]]
    return wide.repeat_interleave(SIDE, dim=0)[: shape[0]] if granularity == Granularity.TILE else wide


def scaled_matmul(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    recipe: Recipe = Recipe.TENSOR,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`(scale_a a) (scale_b b)^T` of two matrices in fp8, summed in float32.

    a: [M, K], b: [N, K], both contiguous along K, as `quantize_fp8` gives them with the granularities of `recipe`. Returns [M, N] in
    `dtype`. One of the two may be e5m2 (a gradient), not both. Not differentiable.
    """
    assert a.shape[1] == b.shape[1], f"{tuple(a.shape)} by {tuple(b.shape)} transposed"
    left, right = Recipe(recipe).granularities()
    wide = torch.promote_types(scale_a.dtype, torch.float32)
    first = a.detach().to(wide) * expanded(scale_a.detach(), left, a.shape)
    return (first @ (b.detach().to(wide) * expanded(scale_b.detach(), right, b.shape)).t()).to(dtype)


def quantize_blocks(
    x: torch.Tensor, *, block: int = BLOCK, dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor in 8 bits with one scale for each `block` neighbours of its flat form, to be sent.

    x: any shape, n elements. dtype: int8, `codes = round(x * (127 / a))`, a the block's largest magnitude, an error of at most a / 254; or
    float8_e4m3fn, an error of at most 1/16 of each number: better only where a block spans orders of magnitude. Rounds to the nearest, ties
    to even: the same on every rank and in every run (the states' code of `colossal_core.rounding` draws at random instead, which an
    average over many steps needs and a sum over ranks does not). Returns codes [n] and scales [ceil(n / block)], float32 (float64 for
    float64). A block that holds a number that is not finite has the scale NaN. Not differentiable.
    """
    most = _most(dtype)
    flat = x.detach().reshape(-1).to(statistics_dtype(x.dtype))
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    finite = blocks.isfinite().all(1)
    largest = blocks.abs().amax(1).where(finite, 0.0).clamp_(min=SMALLEST)
    factors, scales = _both_ways(most, largest)
    scaled = (blocks * factors[:, None]).where(finite[:, None], 0.0).clamp_(-most, most)
    codes = scaled.round_() if dtype == torch.int8 else scaled
    return codes.to(dtype).view(-1)[: len(flat)], scales.where(finite, torch.nan)


def _most(dtype: torch.dtype) -> float:
    assert dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2), dtype
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def dequantize_blocks_sum(
    codes: torch.Tensor, scales: torch.Tensor, *, block: int = BLOCK, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`sum over p of scales[p] * codes[p]`, in float32 and in the order of the parts: what arrives from P ranks becomes one sum.

    codes: [P, n]; scales: [P, ceil(n / block)]: P results of `quantize_blocks`. Returns [n] in `dtype`. P = 1 dequantizes. Not
    differentiable.
    """
    assert len(codes) == len(scales) and scales.shape[1] == -(-codes.shape[1] // block), (codes.shape, scales.shape)
    total = torch.zeros(codes.shape[1], dtype=scales.dtype, device=codes.device)
    for part, factors in zip(codes.detach(), scales.detach(), strict=True):
        total += part.to(scales.dtype) * factors.repeat_interleave(block)[: len(part)]
    return total.to(dtype)
