"""From float32 to the bits of an 8-bit float, to the nearest, ties to even.

On a GPU one instruction does two numbers. Triton's interpreter casts to fp8 by cutting off, and makes 384 of a NaN, so there the bits are
made by integers; both give what torch's cast gives.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fp8_codes(values, E5M2: tl.constexpr, INTERPRETED: tl.constexpr):
    """uint8 codes of values within the format's range, or NaN."""
    if INTERPRETED:
        MANTISSA: tl.constexpr = 2 if E5M2 else 3
        LOWEST: tl.constexpr = -14 if E5M2 else -6
        bits = values.to(tl.int32, bitcast=True)
        exponent = tl.maximum(((bits >> 23) & 0xFF) - 127, LOWEST)
        one_over_unit = ((127 + MANTISSA - exponent) << 23).to(tl.float32, bitcast=True)
        units = (tl.abs(values) * one_over_unit + 8388608.0) - 8388608.0
        code = ((exponent - LOWEST) << MANTISSA) + tl.where(values == values, units, 0.0).to(tl.int32)
        code = tl.where(values == values, code, 0x7F) | tl.where(bits < 0, 0x80, 0)
        return code.to(tl.uint8)
    if E5M2:
        return values.to(tl.float8e5).to(tl.uint8, bitcast=True)
    return values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def scaled_codes(values, factor, E5M2: tl.constexpr, INTERPRETED: tl.constexpr):
    """Codes of float32 `values` times their factor: the format's largest number over the largest of theirs, so that no product lies above
    it by more than rounding takes away. What is not finite is NaN: zero times it is added, and zero of its own sign elsewhere.
    """
    return fp8_codes(values * factor + values * 0.0, E5M2, INTERPRETED)


@triton.jit
def finite_keys(values):
    """int32, ordered as the magnitudes of float32 values, and negative for what is not finite: its bits plus one exponent overflow."""
    return (values.to(tl.int32, bitcast=True) & 0x7FFFFFFF) + 0x00800000


@triton.jit
def largest_bits(key):
    """The bits of the float32 magnitude of a largest key; zero where none was finite."""
    return tl.maximum(key, 0x00800000) - 0x00800000
