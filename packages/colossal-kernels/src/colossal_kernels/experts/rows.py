"""Rows to their experts and back. Each token's features are read once and written to its K rows (`permute`), or its K rows are read once
and summed in float32 (`unpermute`): (1 + K) * D elements a token, forward and backward alike; the backward pass of a weighted `unpermute`
also reads the rows, for the weights' gradient: (1 + 2K) * D. 8192 tokens, K = 8, D = 4096 in bf16: 0.604 GB and 1.141 GB, at least 0.141
and 0.267 ms at 4.27 TB/s. No atomics: rows are found through both directions of the order.

Formulas: `colossal_core.ops.experts`. Letters: N tokens, K choices (`K2` the next power of two), D features, M rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops import experts as reference
from colossal_kernels.builds import Build
from colossal_kernels.fitting import kernels_take
from colossal_kernels.library import define, differentiate

MOST_CHOICES = 32
TILE_COLUMNS = 1024
"""Features of a tile of a token's rows: 16 bytes of each row for each thread, so that sums over rows stay in a thread."""
TILE_ELEMENTS = 8192
"""Of a tile, at most."""
WARPS = 4
SUMMED_BYTES = 16
"""Of a row: neighbours that one sum of the weights' gradient takes in at once."""


def expert_permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`colossal_core.ops.reference.expert_permute`. Keeps nothing of x."""
    if not _fits(x, order, inverse):
        return reference.expert_permute(x, order, inverse)
    y: Tensor = _PERMUTE(x, order, inverse)
    return y


def expert_unpermute(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    """`colossal_core.ops.reference.expert_unpermute`. Keeps y only if there are weights."""
    if not _fits(y, order, inverse) or not kernels_take(y, weights):
        return reference.expert_unpermute(y, order, inverse, weights)
    x: Tensor = _UNPERMUTE(y, order, inverse, weights)
    return x


def _fits(rows: Tensor, order: Tensor, inverse: Tensor) -> bool:
    integers = order.dtype == torch.int32 and inverse.dtype == torch.int32 and inverse.dim() == 2
    some = order.numel() > 0 and inverse.numel() > 0 and order.is_contiguous()
    assert len(rows) in (len(inverse), len(order)), (rows.shape, order.shape, inverse.shape)
    return integers and some and kernels_take(rows) and inverse.shape[1] <= MOST_CHOICES


@triton.jit
def _clear(
    order, y, token, num_rows, num_columns, slice_length, first_column, last_column,
    COLUMNS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Zeros into those of the token's slice of all rows that hold no choice: few, and only if experts are filled up or elsewhere."""
    places = tl.arange(0, SLICE)
    first = token * slice_length
    mine = (places < slice_length) & (first + places < num_rows)
    if tl.min(tl.load(order + first + places, mask=mine, other=0), axis=0) < 0:
        row = first
        for _ in range(tl.minimum(slice_length, num_rows - first).to(tl.int32)):
            if tl.load(order + row) < 0:
                columns = first_column + tl.arange(0, COLUMNS)
                for _ in range(tl.cdiv(last_column - first_column, COLUMNS)):
                    zeros = tl.zeros((COLUMNS,), dtype=y.dtype.element_ty)
                    tl.store(y + row * num_columns + columns, zeros, mask=columns < num_columns)
                    columns += COLUMNS
            row += 1


@triton.jit
def _spread_kernel(
    x, order, inverse, y, row_stride, num_rows, num_columns, slice_length,
    K: tl.constexpr, K2: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One token to its rows."""
    token = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    inside = columns < num_columns
    choices_K = tl.arange(0, K2)
    row_K = tl.load(inverse + token * K + choices_K, mask=choices_K < K, other=-1).to(tl.int64)
    x_D = tl.load(x + token * row_stride + columns, mask=inside, other=0.0)
    y_KD = tl.broadcast_to(x_D[None, :], (K2, COLUMNS))
    there_KD = (row_K >= 0)[:, None] & inside[None, :]
    tl.store(y + row_K[:, None] * num_columns + columns[None, :], y_KD, mask=there_KD)
    _clear(order, y, token, num_rows, num_columns, slice_length, first_column, first_column + COLUMNS, COLUMNS, SLICE)


@triton.jit
def _sum_kernel(
    y, inverse, weights, x, row_stride, num_columns, weight_stride, choice_stride,
    WEIGHTED: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All rows as one tile: every load is under way before the first sum (one row after the other, two were: read in the binary)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < num_columns
    choices_K = tl.arange(0, K2)
    row_K = tl.load(inverse + token * K + choices_K, mask=choices_K < K, other=-1).to(tl.int64)
    there_KD = (row_K >= 0)[:, None] & inside[None, :]
    y_KD = tl.load(y + row_K[:, None] * row_stride + columns[None, :], mask=there_KD, other=0.0).to(tl.float32)
    if WEIGHTED:
        source_K = weights + token * weight_stride + choices_K * choice_stride
        weight_K = tl.load(source_K, mask=row_K >= 0, other=0.0).to(tl.float32)
        y_KD *= weight_K[:, None]
    tl.store(x + token * num_columns + columns, tl.sum(y_KD, axis=0).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_backward_kernel(
    grad_x, y, order, inverse, weights, grad_y, grad_weights,
    grad_stride, row_stride, num_rows, num_columns, weight_stride, choice_stride, slice_length,
    K: tl.constexpr, K2: tl.constexpr, COLUMNS: tl.constexpr, NEIGHBOURS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    choices_K = tl.arange(0, K2)
    row_K = tl.load(inverse + token * K + choices_K, mask=choices_K < K, other=-1).to(tl.int64)
    weight_K = tl.load(weights + token * weight_stride + choices_K * choice_stride, mask=choices_K < K, other=0.0).to(
        tl.float32
    )
    # A thread's own neighbours are summed at once, so that it keeps few sums (47 registers, not 119) and a multiprocessor many programs.
    products_KS = tl.zeros((K2, COLUMNS // NEIGHBOURS), dtype=tl.float32)
    columns = tl.arange(0, COLUMNS)
    for _ in range(tl.cdiv(num_columns, COLUMNS)):
        inside = columns < num_columns
        there_KD = (row_K >= 0)[:, None] & inside[None, :]
        y_KD = tl.load(y + row_K[:, None] * row_stride + columns[None, :], mask=there_KD, other=0.0).to(tl.float32)
        grad_D = tl.load(grad_x + token * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        products_KS += tl.sum(tl.reshape(y_KD * grad_D[None, :], (K2, COLUMNS // NEIGHBOURS, NEIGHBOURS)), axis=2)
        grad_KD = (weight_K[:, None] * grad_D[None, :]).to(grad_y.dtype.element_ty)
        tl.store(grad_y + row_K[:, None] * num_columns + columns[None, :], grad_KD, mask=there_KD)
        columns += COLUMNS
    grad_weight_K = tl.where(row_K >= 0, tl.sum(products_KS, axis=1), 0.0).to(grad_weights.dtype.element_ty)
    tl.store(grad_weights + token * K + choices_K, grad_weight_K, mask=choices_K < K)
    _clear(order, grad_y, token, num_rows, num_columns, slice_length, 0, num_columns, COLUMNS, SLICE)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(num_choices: int, num_columns: int) -> tuple[int, int]:
    """K2 and the features of a tile of all of a token's rows."""
    choices = triton.next_power_of_2(num_choices)
    return choices, min(TILE_COLUMNS, TILE_ELEMENTS // choices, triton.next_power_of_2(num_columns))


def _neighbours(element_bytes: int, num_columns: int) -> int:
    return min(max(SUMMED_BYTES // element_bytes, 1), num_columns)


def _slice(num_rows: int, num_tokens: int) -> tuple[int, int]:
    """How many rows each token's program looks after, and the next power of two."""
    length = triton.cdiv(num_rows, num_tokens)
    return length, triton.next_power_of_2(length)


def _permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    x_ND, y = _rows(x), _permute_fake(x, order, inverse)
    num_tokens, num_columns = x.shape
    choices, columns = _tile(inverse.shape[1], num_columns)
    length, most = _slice(len(order), num_tokens)
    _spread_kernel[(num_tokens, triton.cdiv(num_columns, columns))](
        x_ND, order, inverse.contiguous(), y, x_ND.stride(0), len(order), num_columns, length,
        inverse.shape[1], choices, columns, most, num_warps=WARPS,
    )  # fmt: skip
    return y


def _unpermute(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    y_MD, x = _rows(y), _unpermute_fake(y, order, inverse, weights)
    num_columns = y.shape[1]
    choices, columns = _tile(inverse.shape[1], num_columns)
    strides = (0, 0) if weights is None else weights.stride()
    _sum_kernel[(len(inverse), triton.cdiv(num_columns, columns))](
        y_MD, inverse.contiguous(), weights, x, y_MD.stride(0), num_columns, *strides,
        weights is not None, inverse.shape[1], choices, columns, num_warps=WARPS,
    )  # fmt: skip
    return x


def _weighted_backward(
    grad_x: Tensor, y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    grad_ND, y_MD = _rows(grad_x), _rows(y)
    grad_y, grad_weights = _weighted_backward_fake(grad_x, y, order, inverse, weights)
    num_tokens, num_columns = grad_x.shape
    choices, columns = _tile(inverse.shape[1], num_columns)
    length, most = _slice(len(order), num_tokens)
    _weighted_backward_kernel[(num_tokens,)](
        grad_ND, y_MD, order, inverse.contiguous(), weights, grad_y, grad_weights,
        grad_ND.stride(0), y_MD.stride(0), len(order), num_columns, *weights.stride(), length,
        inverse.shape[1], choices, columns, _neighbours(grad_y.element_size(), columns), most, num_warps=WARPS,
    )  # fmt: skip
    return grad_y, grad_weights


def _permute_fake(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    del inverse
    return x.new_empty(order.shape[0], x.shape[1])


def _unpermute_fake(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    del order, weights
    return y.new_empty(inverse.shape[0], y.shape[1])


def _weighted_backward_fake(
    grad_x: Tensor, y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    del grad_x, order, inverse
    contiguous = torch.contiguous_format
    return torch.empty_like(y, memory_format=contiguous), torch.empty_like(weights, memory_format=contiguous)


_PERMUTE = define("expert_permute(Tensor x, Tensor order, Tensor inverse) -> Tensor", _permute, _permute_fake)
_UNPERMUTE = define(
    "expert_unpermute(Tensor y, Tensor order, Tensor inverse, Tensor? weights) -> Tensor", _unpermute, _unpermute_fake
)
_WEIGHTED_BACKWARD = define(
    "expert_unpermute_backward(Tensor grad_x, Tensor y, Tensor order, Tensor inverse, Tensor weights)"
    " -> (Tensor, Tensor)",
    _weighted_backward,
    _weighted_backward_fake,
)


def _save_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[1:])


def _permute_gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
    order, inverse = ctx.saved_tensors
    return _UNPERMUTE(grad_y, order, inverse, None), None, None


def _save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    y, order, inverse, weights = inputs
    ctx.save_for_backward(order, inverse, weights, None if weights is None else y)


def _unpermute_gradients(ctx: Any, grad_x: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
    order, inverse, weights, y = ctx.saved_tensors
    if weights is None:
        return _PERMUTE(grad_x, order, inverse), None, None, None
    grad_y, grad_weights = _WEIGHTED_BACKWARD(grad_x, y, order, inverse, weights)
    return grad_y, None, None, grad_weights


differentiate("expert_permute", _permute_gradients, _save_permute)
differentiate("expert_unpermute", _unpermute_gradients, _save_unpermute)


def builds() -> tuple[Build, ...]:
    """Eight choices of 4096 features, and six of 2880."""
    found = []
    for dtype, top_k, features in (("bf16", 8, 4096), ("fp32", 6, 2880)):
        name = f"{dtype} {top_k} of {features}"
        values = dict.fromkeys(("x", "y", "grad_x", "grad_y"), f"*{dtype}")
        indices = {"order": "*i32", "inverse": "*i32", "weights": "*fp32", "grad_weights": "*fp32"}
        strides = dict.fromkeys(("row_stride", "grad_stride", "weight_stride", "choice_stride"), "i32")
        sizes = dict.fromkeys(("num_rows", "num_columns", "slice_length"), "i32")
        types = {**values, **indices, **strides, **sizes}
        aligned = ("row_stride", "grad_stride", "num_columns")
        choices, columns = _tile(top_k, features)
        sums = {"K": top_k, "K2": choices, "COLUMNS": columns, "WEIGHTED": True}
        whole = {"K": top_k, "K2": choices, "COLUMNS": columns, "SLICE": choices}
        turned = {**whole, "NEIGHBOURS": _neighbours(2 if dtype == "bf16" else 4, columns)}
        found += [
            Build(f"expert_permute {name}", _spread_kernel, types, whole, WARPS, aligned=aligned),
            Build(f"expert_unpermute {name}", _sum_kernel, types, sums, WARPS, aligned=aligned),
            Build(
                f"expert_unpermute_backward {name}", _weighted_backward_kernel, types, turned, WARPS, aligned=aligned
            ),
        ]
    return tuple(found)
