"""alpha a b + beta c where that is symmetric: the tiles on and under the diagonal are computed, and stored twice, the second time mirrored.

For B matrices [M, K]: B M (M + T) K / 2 multiply-adds in place of B M^2 K; bytes: tiles of a and b mostly from the cache, half of c, and
the result. As the rank-k updates of BLAS (`syrk`), for the iteration of Muon (Jordan et al. 2024). Legend: T the tile's side, D its depth.

"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops import symmetric_product as reference
from colossal_kernels.builds import Build
from colossal_kernels.fitting import kernels_take
from colossal_kernels.library import define, differentiate

SMALLEST = 2048
"""Rows of a matrix from which half the work is faster than all of it at a library's rate; smaller ones stay with the reference."""
TILE, DEPTH = 128, 64
NUM_WARPS, NUM_STAGES = 8, 3
HALVES = (torch.bfloat16, torch.float16)


def symmetric_product(
    a: Tensor, b: Tensor | None = None, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """`colossal_core.ops.reference.symmetric_product`, for bf16 and float16, summed in float32 and rounded once; exactly symmetric but for
    the tiles on the diagonal where b is given."""
    alike = all(found is None or (found.dtype == a.dtype and found.dim() == 3) for found in (a, b, c))
    if a.dtype not in HALVES or not alike or not kernels_take(a, b, c) or a.shape[1] < SMALLEST:
        return reference.symmetric_product(a, b, c, alpha=alpha, beta=beta)
    product: Tensor = _PRODUCT(a, b, c, alpha, beta)
    return product


@triton.jit
def _tile_of(index):
    """(row, column), row >= column, of a tile counted along the rows of the lower half."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit
def _product_kernel(
    a, columns_of_b, c, product, size, depth, a_matrix, a_row, a_column, b_matrix, b_row, b_column, c_matrix, c_row, alpha, beta,
    HAS_C: tl.constexpr, WHOLE_DEPTH: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row, column = _tile_of(tl.program_id(0))
    matrix = tl.program_id(1).to(tl.int64)
    rows = (row * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (column * TILE + tl.arange(0, TILE)).to(tl.int64)
    depths = tl.arange(0, DEPTH)
    a_TD = a + matrix * a_matrix + rows[:, None] * a_row + depths[None, :] * a_column
    b_TD = columns_of_b + matrix * b_matrix + columns[:, None] * b_row + depths[None, :] * b_column
    sum_TT = tl.zeros((TILE, TILE), dtype=tl.float32)
    left = depth
    for _ in range(tl.cdiv(depth, DEPTH)):
        if WHOLE_DEPTH:
            some_a = tl.load(a_TD, mask=rows[:, None] < size, other=0.0)
            some_b = tl.load(b_TD, mask=columns[:, None] < size, other=0.0)
        else:
            some_a = tl.load(a_TD, mask=(rows[:, None] < size) & (depths[None, :] < left), other=0.0)
            some_b = tl.load(b_TD, mask=(columns[:, None] < size) & (depths[None, :] < left), other=0.0)
        sum_TT = tl.dot(some_a, tl.trans(some_b), sum_TT)
        a_TD += DEPTH * a_column
        b_TD += DEPTH * b_column
        left -= DEPTH
    sum_TT = sum_TT * alpha
    inside = (rows[:, None] < size) & (columns[None, :] < size)
    if HAS_C:
        c_TT = tl.load(c + matrix * c_matrix + rows[:, None] * c_row + columns[None, :], mask=inside, other=0.0)
        sum_TT += beta * c_TT.to(tl.float32)
    result_TT = sum_TT.to(product.dtype.element_ty)
    product += matrix * size * size
    tl.store(product + rows[:, None] * size + columns[None, :], result_TT, mask=inside)
    if row != column:
        mirrored = (columns[:, None] < size) & (rows[None, :] < size)
        tl.store(product + columns[:, None] * size + rows[None, :], tl.trans(result_TT), mask=mirrored)


def _strided(matrices: Tensor) -> Tensor:
    """Neighbouring rows or neighbouring columns; a copy where the layout has neither."""
    return matrices if 1 in matrices.stride()[1:] else matrices.contiguous()


def _launch(a: Tensor, b: Tensor | None, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    a = _strided(a)
    columns = a if b is None else _strided(b).mT
    if c is not None and c.stride(2) != 1:
        c = c.contiguous()
    count, size, depth = a.shape
    product = torch.empty((count, size, size), dtype=a.dtype, device=a.device)
    tiles = triton.cdiv(size, TILE)
    _product_kernel[(tiles * (tiles + 1) // 2, count)](
        a, columns, c, product, size, depth, *a.stride(), *columns.stride(), *((0, 0) if c is None else c.stride()[:2]),
        alpha, beta, c is not None, depth % DEPTH == 0, TILE, DEPTH, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return product


def _fake(a: Tensor, b: Tensor | None, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    return a.new_empty((a.shape[0], a.shape[1], a.shape[1]))


_PRODUCT = define(
    "symmetric_product(Tensor a, Tensor? b, Tensor? c, float alpha, float beta) -> Tensor", _launch, _fake
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, c, ctx.alpha, ctx.beta = inputs
    ctx.has_c = c is not None
    ctx.save_for_backward(a, b)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    grad_c = ctx.beta * grad if ctx.has_c else None
    if b is None:
        return ctx.alpha * ((grad + grad.mT) @ a), None, grad_c, None, None
    return ctx.alpha * (grad @ b.mT), ctx.alpha * (a.mT @ grad), grad_c, None, None


differentiate("symmetric_product", _gradients, _save, twice=True)


def builds() -> tuple[Build, ...]:
    """A Gram matrix in bf16, of a matrix that lies row by row and of one column by column; a step of the polynomial in float16."""
    found = []
    names = ("size", "depth", "a_matrix", "b_matrix", "c_matrix", "c_row", "a_row", "b_row", "a_column", "b_column")
    for name, dtype, has_c, ones in (
        ("bf16", "bf16", False, ("a_column", "b_column")),
        ("bf16 transposed", "bf16", False, ("a_row", "b_row")),
        ("fp16 added", "fp16", True, ("a_column", "b_row")),
    ):
        pointers = dict.fromkeys(("a", "columns_of_b", "product") + (("c",) if has_c else ()), f"*{dtype}")
        types = pointers | dict.fromkeys([one for one in names if one not in ones], "i32")
        types |= {"alpha": "fp32", "beta": "fp32"}
        constants: dict[str, Any] = {"HAS_C": has_c, "WHOLE_DEPTH": True, "TILE": TILE, "DEPTH": DEPTH}
        constants |= dict.fromkeys(ones, 1) | ({} if has_c else {"c": None})
        aligned = tuple(one for one in names if one not in ones)
        found.append(
            Build(
                f"symmetric_product {name}", _product_kernel, types, constants, NUM_WARPS, NUM_STAGES, aligned=aligned
            )
        )
    return tuple(found)
