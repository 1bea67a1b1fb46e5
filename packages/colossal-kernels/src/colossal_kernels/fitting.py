"""Whether a kernel can take these tensors; if not, core's reference does."""

from __future__ import annotations

import torch
from torch import Tensor

from colossal_kernels.interpreting import interpreted
from colossal_kernels.row_layout import MOST_ROWS, num_rows

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""Kernels compute in float32, so float64 would lose digits."""


def kernels_take(*tensors: Tensor | None) -> bool:
    """All of these dtypes, on one device that Triton runs on; the first has elements, in no more rows than an int32 counts."""
    first = tensors[0]
    assert first is not None
    if not (first.is_cuda or interpreted()) or first.numel() == 0 or num_rows(first) > MOST_ROWS:
        return False
    return all(found is None or (found.dtype in DTYPES and found.device == first.device) for found in tensors)


def has_fp8(x: Tensor) -> bool:
    """Whether its device converts to fp8: from sm_89 on."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9)


def have_one_a_feature(x: Tensor, *vectors: Tensor | None) -> bool:
    """Each holds, in neighbouring memory, one number for each of x's features."""
    return all(found is None or (found.shape == x.shape[-1:] and found.is_contiguous()) for found in vectors)


def changeable(x: Tensor) -> bool:
    """Whether its memory may be written: not in compiled code, which decides that itself, nor a leaf's that has a gradient, nor that of a
    tensor which holds an element twice or its features apart.
    """
    if torch.compiler.is_compiling() or x.is_inference() or (x.is_leaf and x.requires_grad):
        return False
    return x.stride(-1) == 1 and has_each_once(x)


def has_each_once(x: Tensor) -> bool:
    """Whether no two elements share memory: each stride is beyond what the smaller ones span."""
    reached = 0
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1):
        if stride <= reached:
            return False
        reached += (size - 1) * stride
    return True
