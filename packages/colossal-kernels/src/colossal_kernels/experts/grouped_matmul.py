"""Products by expert through `torch.nn.functional.grouped_mm` (CUTLASS on sm_90): 390 to 760 TFLOP/s in bf16 on an H200, without the host.

Formula: `colossal_core.ops.experts.grouped_matmul`. Letters: E experts, M rows, D features, F hidden features.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from colossal_core.ops import experts as reference
from colossal_kernels.library import define, differentiate

ALIGNED = 8
"""Features in bf16 that make 16 bytes: every row must start at a multiple of that."""
MOST_GROUPS = 1023
"""Of torch's kernel."""


def grouped_matmul(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """`colossal_core.ops.reference.grouped_matmul`. Rows from offsets[E] on, and those of the gradient of x, are left as they are in
    memory.
    """
    if not takes_grouped(x, weights, offsets):
        return reference.grouped_matmul(x, weights, offsets)
    y: Tensor = _PRODUCT(x, weights, offsets)
    return y


def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Each expert's `a_e^T b_e`: [E, A, B] from a: [M, A] and b: [M, B]; zero for an expert without rows."""
    if takes_grouped(a, b, offsets):
        return F.grouped_mm(_aligned(a).t(), _aligned(b), offs=offsets[1:])
    stops = [int(stop) for stop in offsets.tolist()]
    parts = [a[start:stop].t() @ b[start:stop] for start, stop in itertools.pairwise(stops)]
    return torch.stack(parts)


def takes_grouped(first: Tensor, second: Tensor, offsets: Tensor) -> bool:
    """Whether torch's kernel takes these, or copies of them: bf16 on CUDA, rows of multiples of 16 bytes, and any rows at all."""
    if first.device.type != "cuda" or first.dtype != torch.bfloat16 or second.dtype != torch.bfloat16:
        return False
    sizes = (first.shape[-1], *second.shape[-2:]) if second.dim() == 3 else (first.shape[-1], second.shape[-1])
    dense = second.dim() == 2 or second.is_contiguous() or second.transpose(1, 2).is_contiguous()
    some = first.numel() > 0 and second.numel() > 0 and len(offsets) <= MOST_GROUPS + 1
    return some and dense and all(size % ALIGNED == 0 for size in sizes)


def _aligned(rows: Tensor) -> Tensor:
    """Rows as torch's kernel wants them: a gradient may come as one number or one row expanded, an input as part of wider rows."""
    apart = rows.stride(0) >= rows.shape[1] and rows.stride(0) % ALIGNED == 0
    if rows.stride(1) == 1 and apart and rows.storage_offset() % ALIGNED == 0:
        return rows
    # Not `contiguous()`, which takes a single row as it is, whatever its stride.
    return rows.clone(memory_format=torch.contiguous_format)


def _aligned_matrices(weights: Tensor) -> Tensor:
    """The same for dense matrices, which keep their strides."""
    return weights if weights.storage_offset() % ALIGNED == 0 else weights.clone()


def _product(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(_aligned(x), _aligned_matrices(weights), offs=offsets[1:])


def _product_fake(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    del offsets
    return x.new_empty((x.shape[0], weights.shape[2]))


_PRODUCT = define("grouped_matmul(Tensor x, Tensor weights, Tensor offsets) -> Tensor", _product, _product_fake)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """The gradient of the matrices lies in memory as they do, so that it is not copied when it is added to a parameter's."""
    x, weights, offsets = ctx.saved_tensors
    want_x, want_weights, _ = ctx.needs_input_grad
    grad_y, grad_x, grad_weights = _aligned(grad_y), None, None
    if want_x:
        grad_x = F.grouped_mm(grad_y, _aligned_matrices(weights).transpose(1, 2), offs=offsets[1:])
    if want_weights and weights.is_contiguous():
        grad_weights = F.grouped_mm(_aligned(x).t(), grad_y, offs=offsets[1:])
    elif want_weights:
        grad_weights = F.grouped_mm(grad_y.t(), _aligned(x), offs=offsets[1:]).transpose(1, 2)
    return grad_x, grad_weights, None


differentiate("grouped_matmul", _gradients, _save)
