"""A tensor times a number that only the device knows, in its place: one read and one write, and neither where the number is one, which is
what arrives at a loss that is not scaled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_kernels.builds import Build
from colossal_kernels.library import define

SCALE_BLOCK, SCALE_WARPS, SCALE_PROGRAMS = 4096, 4, 8 * 132
"""Numbers at a time, warps of a program, and programs at most, 8 for each multiprocessor of an H200."""


@triton.jit
def _scale_kernel(x, factor, num_blocks, count, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    block = tl.program_id(0).to(tl.int64)
    if by != 1.0:
        while block < num_blocks:
            places = block * BLOCK + tl.arange(0, BLOCK)
            found = tl.load(x + places, mask=places < count).to(tl.float32) * by
            tl.store(x + places, found.to(x.dtype.element_ty), mask=places < count)
            block += tl.num_programs(0)


def scale_in_place(tensor: Tensor, factor: Tensor) -> Tensor:
    """The tensor, which is contiguous, times the factor, one number of float32, rounded once."""
    if tensor.numel() == 0 or torch.compiler.is_compiling():
        return tensor.mul_(factor)
    _SCALE(tensor, factor)
    # torch counts no version for operators of its library, and a second backward pass must fail.
    torch.autograd.graph.increment_version(tensor)
    return tensor


def _scale(tensor: Tensor, factor: Tensor) -> None:
    num_blocks = triton.cdiv(tensor.numel(), SCALE_BLOCK)
    programs = min(num_blocks, SCALE_PROGRAMS)
    _scale_kernel[(programs,)](tensor, factor, num_blocks, tensor.numel(), SCALE_BLOCK, num_warps=SCALE_WARPS)


def _scale_fake(tensor: Tensor, factor: Tensor) -> None:
    return None


_SCALE = define("scale_(Tensor(a!) tensor, Tensor factor) -> ()", _scale, _scale_fake)


def scale_builds() -> tuple[Build, ...]:
    types = {"x": "*bf16", "factor": "*fp32", "num_blocks": "i32", "count": "i32"}
    return (Build("loss scaling bf16", _scale_kernel, types, {"BLOCK": SCALE_BLOCK}, SCALE_WARPS, aligned=("count",)),)
