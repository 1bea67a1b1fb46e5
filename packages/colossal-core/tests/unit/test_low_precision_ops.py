"""The reference ops in 8 bits: their errors, scales and layouts."""

from __future__ import annotations

import math

import pytest
import torch

from colossal_core.ops.low_precision import (
    Granularity,
    Recipe,
    dequantize_blocks_sum,
    expanded,
    quantize_blocks,
    quantize_fp8,
    scaled_matmul,
)

HALF_STEP = {torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}
"""The largest relative error of a number that is not subnormal in the format."""


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", list(HALF_STEP))
@pytest.mark.parametrize("granularity", list(Granularity))
def test_numbers_come_back_to_half_a_step(granularity: Granularity, dtype: torch.dtype) -> None:
    x = randn(130, 200) * torch.logspace(-2, 2, 130, dtype=torch.float64)[:, None]
    codes, scales = quantize_fp8(x, granularity, dtype=dtype)
    error = (codes.double() * expanded(scales, granularity, x.shape) - x).abs()
    subnormal = torch.finfo(dtype).smallest_normal * expanded(scales, granularity, x.shape)
    assert bool((error <= HALF_STEP[dtype] * x.abs().maximum(subnormal)).all())


def test_scales_have_the_shapes_that_products_take() -> None:
    x = randn(130, 300).float()
    found = {kind: quantize_fp8(x, kind)[1] for kind in Granularity}
    shapes = {kind: (tuple(scales.shape), scales.stride()) for kind, scales in found.items()}
    assert shapes == {
        Granularity.TENSOR: ((), ()),
        Granularity.ROW: ((130, 1), (1, 1)),
        Granularity.BLOCK: ((130, 3), (1, 130)),
        Granularity.TILE: ((2, 3), (3, 1)),
    }
    assert all(scales.dtype == torch.float32 for scales in found.values())
    assert float(found[Granularity.TENSOR]) == float(x.abs().max() / 448)
    assert float(found[Granularity.TILE][1, 2]) == float(x[128:, 256:].abs().max() / 448)


@pytest.mark.parametrize("granularity", list(Granularity))
def test_the_transposed_copy_is_that_of_the_transpose(granularity: Granularity) -> None:
    x = randn(130, 140).float()
    *_, codes, scales = quantize_fp8(x, granularity, transposed=True)
    wanted_codes, wanted_scales = quantize_fp8(x.t().contiguous(), granularity)
    assert torch.equal(codes.float(), wanted_codes.float())
    assert codes.is_contiguous()
    assert torch.equal(scales, wanted_scales)


def test_what_is_not_finite_is_nan_and_changes_no_scale() -> None:
    x = torch.tensor([[1.0, -2.0, math.nan, math.inf, -math.inf, 0.0]])
    codes, scales = quantize_fp8(x)
    assert codes.float().isnan().tolist() == [[False, False, True, True, True, False]]
    assert codes.float()[0, :2].tolist() == [224.0, -448.0]
    assert float(scales) == float(torch.tensor(2.0) / 448)


def test_zeros_stay_zeros() -> None:
    codes, scales = quantize_fp8(torch.zeros(2, 3), Granularity.ROW)
    assert torch.equal(codes.float() * scales, torch.zeros(2, 3))


@pytest.mark.parametrize("recipe", list(Recipe))
def test_a_product_is_that_of_the_numbers_that_codes_stand_for(recipe: Recipe) -> None:
    left, right = recipe.granularities()
    x, w = randn(130, 200), randn(140, 200, seed=1)
    (a, scale_a), (b, scale_b) = quantize_fp8(x, left), quantize_fp8(w, right)
    y = scaled_matmul(a, scale_a, b, scale_b, recipe, dtype=torch.float64)
    exact = (a.double() * expanded(scale_a, left, x.shape)) @ (b.double() * expanded(scale_b, right, w.shape)).t()
    assert torch.equal(y, exact)
    assert float((y - x @ w.t()).norm() / (x @ w.t()).norm()) < 0.05


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_blocks_come_back_to_half_a_step(dtype: torch.dtype) -> None:
    x = randn(7, 100) * torch.logspace(-3, 3, 100, dtype=torch.float64)
    codes, scales = quantize_blocks(x, block=64, dtype=dtype)
    back = dequantize_blocks_sum(codes[None], scales[None], block=64, dtype=torch.float64)
    step = scales.repeat_interleave(64)[:700] / 2 if dtype == torch.int8 else x.flatten().abs() / 16
    tiny = scales.repeat_interleave(64)[:700] * 2.0**-10
    assert bool(((back - x.flatten()).abs() <= step.maximum(tiny) * (1 + 1e-12)).all())
    assert (codes.dtype, codes.shape, scales.shape) == (dtype, (700,), (11,))


def test_a_block_that_is_not_finite_is_all_nan_and_its_neighbours_are_not() -> None:
    x = torch.ones(12)
    x[5] = math.inf
    codes, scales = quantize_blocks(x, block=4)
    back = dequantize_blocks_sum(codes[None], scales[None], block=4)
    assert back.isnan().nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert back[:4].tolist() == [1.0] * 4


def test_parts_are_summed_in_float32_in_their_order() -> None:
    parts = [quantize_blocks(randn(40, seed=seed).float(), block=16) for seed in range(3)]
    codes, scales = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    each = [dequantize_blocks_sum(code[None], scale[None], block=16) for code, scale in parts]
    assert torch.equal(dequantize_blocks_sum(codes, scales, block=16), (each[0] + each[1]) + each[2])
