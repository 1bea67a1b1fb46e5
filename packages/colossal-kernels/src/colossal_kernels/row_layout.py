"""Rows of a tensor of any dimensions, addressed without a copy: all leading dimensions are one row index, in at most three strides.

Models hand over transposed views ([B, H, L, D] over memory of [B, L, H, D]) and slices of a fused product; a copy of such an activation
takes as long as the kernel that reads it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = (1 << 31) - (1 << 16)
"""A row's index is an int32 in kernels, tiles at the end included; its address is int64."""


class RowLayout(NamedTuple):
    """Row r starts at element `r // (middle * inner) * outer_stride + r // inner % middle * middle_stride + r % inner * inner_stride`."""

    middle: int
    inner: int
    outer_stride: int
    middle_stride: int
    inner_stride: int


def row_layout(x: Tensor) -> RowLayout | None:
    """Of [..., D] with neighbouring features; None where three strides do not address the rows."""
    size = x.shape[-1]
    if x.is_contiguous():
        return RowLayout(1, 1, size, 0, 0)
    if x.stride(-1) != 1 and size != 1:
        return None
    runs: list[tuple[int, int]] = []
    for count, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if count == 1:
            continue
        if runs and runs[-1][0] * runs[-1][1] == stride:
            runs[-1] = (runs[-1][0] * count, runs[-1][1])
        else:
            runs.append((count, stride))
    if len(runs) > 3:
        return None
    outer = runs.pop() if runs else (1, 0)
    inner = runs.pop(0) if runs else (1, 0)
    middle = runs.pop() if runs else (1, 0)
    return RowLayout(middle[0], inner[0], outer[1], middle[1], inner[1])


def with_rows(x: Tensor) -> tuple[Tensor, RowLayout]:
    """The tensor itself, or a contiguous copy where its rows cannot be addressed."""
    layout = row_layout(x)
    if layout is not None:
        return x, layout
    copy = x.contiguous()
    return copy, RowLayout(1, 1, x.shape[-1], 0, 0)


def num_rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


@triton.jit
def row_starts(rows, middle, inner, outer_stride, middle_stride, inner_stride):
    """The element at which each row starts, int64. Triton compiles `middle == inner == 1` away."""
    groups = rows // inner
    outer = (groups // middle).to(tl.int64) * outer_stride
    return outer + (groups % middle).to(tl.int64) * middle_stride + (rows % inner).to(tl.int64) * inner_stride


@triton.jit
def one_a_column(pointer, columns, here, ROWS: tl.constexpr):
    """A vector's numbers [1, D] beside tiles of `ROWS` rows, zero where not `here`. Threads exchange them where a tile has several rows,
    once: the compiler takes that out of loops.
    """
    if ROWS == 1:
        found = tl.load(pointer + columns[None, :], mask=here[None, :], other=0.0)
    else:
        found = tl.load(pointer + columns, mask=here, other=0.0)[None, :]
    return found
