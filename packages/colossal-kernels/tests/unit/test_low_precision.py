"""Operations in 8 bits, in the interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from colossal_core.ops import OpImplementation
from colossal_core.ops import low_precision as reference
from colossal_core.ops.low_precision import Granularity
from colossal_core.testing import OpSuite
from colossal_kernels.low_precision.blocks import dequantize_blocks_sum, quantize_blocks
from colossal_kernels.low_precision.quantize_fp8 import quantize_fp8
from colossal_kernels.table import implementations

OPERATOR_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]


def ours(op: str) -> OpImplementation:
    return next(found for found in implementations() if found.op == op and found.fits("cpu", "float32"))


class TestQuantizeFp8(OpSuite):
    implementation = ours("quantize_fp8")
    dtypes = ("float32", "float16")


class TestQuantizeBlocks(OpSuite):
    implementation = ours("quantize_blocks")
    dtypes = ("float32", "float16")


class TestDequantizeBlocksSum(OpSuite):
    implementation = ours("dequantize_blocks_sum")
    dtypes = ("float32",)


def wild(*shape: int) -> torch.Tensor:
    """Numbers over many orders of magnitude, some of them not finite."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(6.0).exp()
    flat = x.view(-1)
    flat[::97] = math.nan
    flat[1::101] = math.inf
    flat[2::103] = -math.inf
    flat[3::89] = 0.0
    return x


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's NumPy says what it makes of NaN
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("rows", [130, 132])
def test_codes_and_scales_are_the_reference_s_bit_for_bit(
    rows: int, granularity: Granularity, dtype: torch.dtype
) -> None:
    """Transposed codes are written one by one, or four at a time."""
    x = wild(rows, 140)
    found = quantize_fp8(x, granularity, dtype=dtype, transposed=True)
    wanted = reference.quantize_fp8(x, granularity, dtype=dtype, transposed=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a.float().isnan(), b.float().isnan())
        assert torch.equal(a.float().nan_to_num(), b.float().nan_to_num())
    turned = quantize_fp8(x.t(), granularity, dtype=dtype)
    assert torch.equal(turned[0].view(torch.uint8), found[2].view(torch.uint8))
    assert torch.equal(turned[1], found[3])


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_code_is_the_nearest_number_of_the_format(dtype: torch.dtype) -> None:
    """All numbers of the format, those half way between two, and their neighbours in float32. The largest makes the scale 1."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    most = torch.full_like(middles, math.inf)
    x = torch.cat([numbers, middles, middles.nextafter(most), middles.nextafter(-most)])[None, :]
    codes, scales = quantize_fp8(x, Granularity.ROW, dtype=dtype)
    assert scales.item() == 1.0
    assert torch.equal(codes.view(torch.uint8), x.to(dtype).view(torch.uint8))


def test_a_row_of_zeros_stays_zero() -> None:
    codes, scales = quantize_fp8(torch.zeros(2, 5), Granularity.ROW)
    assert torch.equal(codes.float(), torch.zeros(2, 5))
    assert bool((scales > 0).all())


@pytest.mark.parametrize("dtype", [torch.int8, *FORMATS])
def test_blocks_are_the_reference_s_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.randn(777, generator=torch.Generator().manual_seed(1)) * 1e-3
    x[300], x[500] = math.nan, math.inf
    found = quantize_blocks(x, block=64, dtype=dtype)
    wanted = reference.quantize_blocks(x, block=64, dtype=dtype)
    assert torch.equal(found[0].view(torch.uint8), wanted[0].view(torch.uint8))
    assert found[1].isnan().nonzero().flatten().tolist() == [4, 7]
    assert torch.equal(found[1].nan_to_num(), wanted[1].nan_to_num())


def test_integers_of_int8_blocks_come_back_as_they_were() -> None:
    x = torch.arange(-127.0, 128.0)
    codes, scales = quantize_blocks(x)
    assert torch.equal(dequantize_blocks_sum(codes[None], scales[None]), x)
    assert bool(
        ((x + 0.49) - dequantize_blocks_sum(*(t[None] for t in quantize_blocks(x + 0.49)))).abs().max() <= 0.502
    )


@pytest.mark.parametrize("num_parts", [3, 11])
@pytest.mark.parametrize("dtype", [torch.int8, *FORMATS])
def test_parts_are_summed_in_their_order(dtype: torch.dtype, num_parts: int) -> None:
    """Few, whose codes are all read before they are summed, and more than that."""
    powers = [4, -2, 0, 1, 3, -1, 2, 4, 0, -3, 1][:num_parts]
    parts = [quantize_blocks(torch.randn(300) * 10.0**power, block=32, dtype=dtype) for power in powers]
    codes, scales = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    total = dequantize_blocks_sum(codes, scales, block=32)
    assert torch.equal(total, reference.dequantize_blocks_sum(codes, scales, block=32))
    assert torch.equal(total, dequantize_blocks_sum(codes, scales, block=32))
    narrow = dequantize_blocks_sum(codes, scales, block=32, dtype=torch.float16)
    assert torch.equal(narrow, total.to(torch.float16))


def test_rows_may_lie_more_than_two_to_the_31st_elements_apart() -> None:
    """4 GiB are addressed, two pages of them touched."""
    stride = (1 << 31) + 8
    memory = torch.empty(stride + 4, dtype=torch.float16)
    x = memory.as_strided((2, 4), (stride, 1))
    x.copy_(torch.arange(8.0).view(2, 4))
    for granularity in Granularity:
        codes, scales = quantize_fp8(x, granularity)
        wanted = reference.quantize_fp8(x, granularity)
        assert torch.equal(codes.view(torch.uint8), wanted[0].view(torch.uint8))
        assert torch.equal(scales, wanted[1])


def operators() -> list[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(3, 8)
    codes, scales = quantize_blocks(x, block=8)
    ops = torch.ops.colossal_kernels
    kinds = [(ops.quantize_fp8.default, (x, kind.value, torch.float8_e4m3fn, True)) for kind in Granularity]
    return [
        *kinds,
        (ops.quantize_blocks.default, (x, 8, torch.int8)),
        (ops.dequantize_blocks_sum.default, (codes[None], scales[None], 8, torch.float32)),
    ]


@pytest.mark.parametrize("index", range(6))
def test_torch_knows_the_operators(index: int) -> None:
    operator, arguments = operators()[index]
    torch.library.opcheck(operator, arguments, test_utils=OPERATOR_TESTS)
