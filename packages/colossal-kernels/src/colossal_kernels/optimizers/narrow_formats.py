"""Formats narrower than float32 inside kernels: bf16 and 8-bit codes, rounded stochastically as `colossal_core.rounding` has it, by draws
that a seed and an element's place decide.
"""

from __future__ import annotations

import triton
import triton.language as tl

CODE_BLOCK = tl.constexpr(256)
"""Elements that share a scale (`colossal_core.rounding.BLOCK`)."""
_TINY = tl.constexpr(1.1754943508222875e-38)
_CERTAIN = tl.constexpr(1e-4)


@triton.jit
def mixed(x):
    """32 bits from 32 bits, each of which depends on all (the finaliser of MurmurHash3, Appleby 2011). x: uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def draws(seed, blocks, STREAM: tl.constexpr):
    """uint32 [R, 256]: 32 random bits for each element of blocks [R], by (seed, stream, block, place in it)."""
    key_R = mixed(blocks.to(tl.uint32) ^ mixed(seed.to(tl.uint32) + ((STREAM * 0x9E3779B9) & 0xFFFFFFFF)))
    places = tl.arange(0, CODE_BLOCK).to(tl.uint32) * 0x9E3779B9
    return mixed(key_R[:, None] + places[None, :])


@triton.jit
def to_bf16(x, bits):
    """float32 to one of its two bf16 neighbours, as float32: the lower half plus 16 random bits carries into the upper one."""
    raised = x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)
    rounded = (raised & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) <= 3.4028234663852886e38, rounded, x)


@triton.jit
def decoded(codes, scales, POSITIVE: tl.constexpr):
    """float32 [R, 256] of codes and scales [R]: scale (c / 127)^2 with c's sign; POSITIVE: scale (c / 255)^4."""
    if POSITIVE:
        value = codes.to(tl.float32) / 255.0
        value = value * value
        value = value * value
    else:
        value = codes.to(tl.float32) / 127.0
        value = value * tl.abs(value)
    return value * scales[:, None]


@triton.jit
def coded(x, bits, POSITIVE: tl.constexpr):
    """Codes as float32 [R, 256] and scales [R] of x: one of the two neighbouring codes, so that the expected value is x."""
    scales = tl.max(tl.abs(x), axis=1)
    ratio = tl.abs(x) / tl.maximum(scales, _TINY)[:, None]
    root = tl.sqrt(ratio)
    if POSITIVE:
        low = tl.minimum(tl.floor(tl.sqrt(root) * 255.0), 254.0)
        below = low * low
        above = (low + 1.0) * (low + 1.0)
        below = below * below
        above = above * above
        chance = (ratio * 4228250625.0 - below) / (above - below)
    else:
        low = tl.minimum(tl.floor(root * 127.0), 126.0)
        below = low * low
        chance = (ratio * 16129.0 - below) / ((low + 1.0) * (low + 1.0) - below)
    chance = tl.where(chance < _CERTAIN, 0.0, tl.where(chance > 1.0 - _CERTAIN, 1.0, chance))
    draw = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08
    codes = low + tl.where(draw < chance, 1.0, 0.0)
    if POSITIVE:
        codes = tl.maximum(codes, 1.0)
    else:
        codes = tl.where(x < 0.0, -codes, codes)
    return codes, scales
