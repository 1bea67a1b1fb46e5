"""The formulas of all losses over a vocabulary, as kernels use them: of a block of one row's logits."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)
"""The largest finite float32: a running maximum stays within it, so that no infinity is taken off another."""


@triton.jit
def grown(largest, sums_B, x_B):
    """Maximum and sums of exponentials with another block: one exponential an element, sums apart for each place of the block."""
    larger = tl.minimum(tl.maximum(largest, tl.max(x_B, axis=0)), LARGEST)
    return larger, sums_B * tl.exp(largest - larger) + tl.exp(x_B - larger)


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
def gradient_of_block(x_B, columns, lse, place, z_loss, smoothing, num_words, Z: tl.constexpr):
    """Of one row's loss to a block of its logits. place: the label's column."""
    found_B = tl.exp(x_B - lse)
    if Z:
        found_B *= 1.0 + 2.0 * z_loss * lse
    found_B -= smoothing / num_words
    return tl.where(columns == place, found_B - (1.0 - smoothing), found_B)
