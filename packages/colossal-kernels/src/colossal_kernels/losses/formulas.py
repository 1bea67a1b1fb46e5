"""The formulas of all losses over a vocabulary, as kernels use them, and the reading of a row: of its logits the maximum and sums.

Legend: B columns at a time, W neighbours of them that a thread reads at once (16 bytes), P places, for each of which a thread keeps a
maximum and sums: a program's threads meet once a row, not once a block.

Rows of 50257 words, as GPT-2 has, begin anywhere. HEADED: columns are counted from the first multiple of 16 bytes in the row, so that
blocks are read and written 16 bytes at a time; the up to 7 columns before it, which are negative, are the row's head.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)
"""The largest finite float32: a running maximum stays within it, so that no infinity is taken off another."""


@triton.jit
def grown(largest_P, sums_P, x_B, WIDTH: tl.constexpr):
    """Maxima and sums of exponentials with another block: one exponential an element, and one for each place."""
    x_PW = tl.reshape(x_B, (x_B.shape[0] // WIDTH, WIDTH))
    larger_P = tl.minimum(tl.maximum(largest_P, tl.max(x_PW, axis=1)), LARGEST)
    sums_P = sums_P * tl.exp(largest_P - larger_P) + tl.sum(tl.exp(x_PW - larger_P[:, None]), axis=1)
    return larger_P, sums_P


@triton.jit
def sum_of_places(x_B, WIDTH: tl.constexpr):
    return tl.sum(tl.reshape(x_B, (x_B.shape[0] // WIDTH, WIDTH)), axis=1)


@triton.jit
def joined(largest_P, sums_P):
    """Of all places: the maximum, finite, and the sum of exponentials relative to it."""
    largest = tl.max(largest_P, axis=0)
    return largest, tl.sum(sums_P * tl.exp(largest_P - largest), axis=0)


@triton.jit
def head_of(row, HEADED: tl.constexpr):
    """Elements from the row, a pointer, to the first multiple of 16 bytes; without HEADED none."""
    head = 0
    if HEADED:
        item = row.dtype.element_ty.primitive_bitwidth // 8
        head = ((16 - row.to(tl.int64) % 16) % 16).to(tl.int32) // item
    return head


@triton.jit
def behind(row, head, HEADED: tl.constexpr):
    if HEADED:
        row = tl.multiple_of(row + head, 16)
    return row


@triton.jit
def sums_of_row(
    x, head, start, stop, SUM: tl.constexpr, HEADED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """Maximum, sum of exponentials relative to it and (SUM) sum of the logits start..stop of x, and of the `head` before column 0.
    start: of a block.
    """
    WIDTH: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    columns = tl.arange(0, BLOCK)
    largest_P = tl.full((BLOCK // WIDTH,), -LARGEST, tl.float32)
    sums_P = tl.zeros((BLOCK // WIDTH,), tl.float32)
    total_P = tl.zeros((BLOCK // WIDTH,), tl.float32)
    last = stop // BLOCK * BLOCK
    for column in tl.range(start, last, BLOCK, num_stages=STAGES):
        x_B = tl.load(x + column + columns).to(tl.float32)
        largest_P, sums_P = grown(largest_P, sums_P, x_B, WIDTH)
        if SUM:
            total_P += sum_of_places(x_B, WIDTH)
    if (last >= start) & (last < stop):
        inside = last + columns < stop
        x_B = tl.load(x + last + columns, mask=inside, other=float("-inf")).to(tl.float32)
        largest_P, sums_P = grown(largest_P, sums_P, x_B, WIDTH)
        if SUM:
            total_P += sum_of_places(tl.where(inside, x_B, 0.0), WIDTH)
    largest, found = joined(largest_P, sums_P)
    total = tl.sum(total_P, axis=0)
    if HEADED:
        column = tl.arange(0, WIDTH) - WIDTH
        inside = (column >= -head) & (column < stop)
        x_W = tl.load(x + column, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.minimum(tl.maximum(largest, tl.max(x_W, axis=0)), LARGEST)
        found = found * tl.exp(largest - larger) + tl.sum(tl.exp(x_W - larger), axis=0)
        largest = larger
        if SUM:
            total += tl.sum(tl.where(inside, x_W, 0.0), axis=0)
    return largest, found, total


@triton.jit
def logarithm(x):
    """Minus infinity of zero, without asking for the logarithm of zero, of which the interpreter warns."""
    return tl.where(x == 0.0, float("-inf"), tl.log(tl.where(x == 0.0, 1.0, x)))


@triton.jit
def loss_of_row(lse, chosen, total, num_words, z_loss, smoothing, SUM: tl.constexpr, Z: tl.constexpr):
    found = lse - chosen
    if SUM:
        found += smoothing * (chosen - total / num_words)
    if Z:
        found += z_loss * lse * lse
    return found


@triton.jit
def gradient_of_block(x_B, columns, lse, place, z_loss, smoothing, num_words, scale, Z: tl.constexpr):
    """scale times that of one row's loss to a block of its logits: an exponential and a product-sum a logit. place: the label's column."""
    factor = scale
    if Z:
        factor *= 1.0 + 2.0 * z_loss * lse
    found_B = tl.exp(x_B - lse) * factor - scale * (smoothing / num_words)
    return tl.where(columns == place, found_B - scale * (1.0 - smoothing), found_B)
