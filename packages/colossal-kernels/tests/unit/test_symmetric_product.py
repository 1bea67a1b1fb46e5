"""The symmetric product in the interpreter, with small tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from colossal_core.ops import symmetric_product as reference
from colossal_core.testing import OpSuite
from colossal_kernels.optimizers import symmetric_product as module
from colossal_kernels.table import implementations

symmetric_product = module.symmetric_product


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few numbers are a matrix, and some matrices have several tiles."""
    for name, value in (("SMALLEST", 1), ("TILE", 16), ("DEPTH", 16)):
        monkeypatch.setattr(module, name, value)


class TestSymmetricProduct(OpSuite):
    implementation = next(found for found in implementations() if found.op == "symmetric_product")
    dtypes = ("float16",)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


@pytest.mark.parametrize("size", [1, 16, 40, 67])
def test_is_symmetric_to_the_bit(size: int) -> None:
    product = symmetric_product(drawn(2, size, 21))
    assert torch.equal(product, product.mT)
    wanted = reference.symmetric_product(drawn(2, size, 21).double())
    torch.testing.assert_close(product.double(), wanted, rtol=1e-3, atol=1e-3)


def test_polynomials_of_one_matrix() -> None:
    """Factors that commute: what the iteration of Muon multiplies."""
    x = drawn(2, 40, 50) / 40
    gram = symmetric_product(x)
    change = symmetric_product(gram, gram, gram, alpha=2.0, beta=-4.5)
    product = symmetric_product(change, gram, gram, beta=3.4)
    wide = x.double() @ x.double().mT
    wide_change = 2.0 * wide @ wide - 4.5 * wide
    torch.testing.assert_close(product.double(), wide_change @ wide + 3.4 * wide, rtol=2e-3, atol=2e-3)


@triton.jit  # type: ignore[untyped-decorator]
def _tiles(indices, found_rows, found_columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, BLOCK)
    row, column = module._tile_of(tl.load(indices + places))
    tl.store(found_rows + places, row)
    tl.store(found_columns + places, column)


def test_every_tile_of_the_lower_half_is_met_once() -> None:
    """The row of a tile is found by a square root in float32: right also where that rounds."""
    rows = torch.tensor([*range(1, 2047), 4095, 4096], dtype=torch.int32)
    firsts = rows * (rows + 1) // 2
    found_rows, found_columns = torch.empty_like(rows), torch.empty_like(rows)
    _tiles[(1,)](firsts, found_rows, found_columns, BLOCK=len(rows))
    assert torch.equal(found_rows, rows) and not found_columns.any()
    _tiles[(1,)](firsts - 1, found_rows, found_columns, BLOCK=len(rows))
    assert torch.equal(found_rows, rows - 1) and torch.equal(found_columns, rows - 1)


def test_torch_knows_the_operator() -> None:
    a, gram = drawn(2, 5, 7), drawn(2, 5, 5)
    operator = torch.ops.colossal_kernels.symmetric_product.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    cases: list[tuple[Any, ...]] = [(a, None, None), (gram, gram.clone(), gram.clone())]
    for case in cases:
        inputs = [None if tensor is None else tensor.requires_grad_() for tensor in case]
        torch.library.opcheck(operator, (*inputs, 1.0, 0.5), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_and_small_matrices_stay_with_the_reference(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = drawn(1, 6, 9).to(dtype)
    assert torch.equal(symmetric_product(a), reference.symmetric_product(a))
    monkeypatch.setattr(module, "SMALLEST", 2048)
    half = a.half()
    assert torch.equal(symmetric_product(half, alpha=0.5), reference.symmetric_product(half, alpha=0.5))


def test_rows_more_than_32_bits_apart() -> None:
    """The last row begins 2^32 elements behind the first, in memory of which only the rows are ever touched."""
    size, apart = 17, 1 << 28
    rows = torch.empty((size - 1) * apart + 4, dtype=torch.float16).as_strided((1, size, 4), (0, apart, 1))
    rows.copy_(drawn(1, size, 4))
    assert torch.equal(symmetric_product(rows), symmetric_product(drawn(1, size, 4)))
