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


def changeable(x: Tensor) -> bool:
    """Whether its memory may be written: not in compiled code, which decides that itself, nor a leaf's that has a gradient, nor that of a
    tensor which holds an element twice or its features apart.
    """
    if torch.compiler.is_compiling():
        return False
    spread = all(stride != 0 or size == 1 for size, stride in zip(x.shape, x.stride(), strict=True))
    return not (x.is_leaf and x.requires_grad) and not x.is_inference() and x.stride(-1) == 1 and spread
