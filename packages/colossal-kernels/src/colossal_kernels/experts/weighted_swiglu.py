"""The gate of experts: `h = weight * silu(gate) * up` over packed rows, the weight found through the order. Weighted here and not after the
second product: 768 features a row instead of 2048, and the weight's gradient needs no output of the experts kept.

Forward reads 2F and writes F numbers a row. Backward reads 3F and writes 3F: the gradient of the packed rows, and h once more, over its own
gradient, for the gradient of the second matrix. 32,768 rows of F = 768 in bf16: 151 and 302 MB, at least 0.035 and 0.071 ms at 4.27 TB/s.
Letters: M rows, F hidden features, R x C a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_kernels.builds import Build
from colossal_kernels.library import define

ROWS, COLUMNS = 8, 256
"""Of a tile: 16 bytes of gate and of up for each thread, twice."""
WARPS = 4
FEWEST_COLUMNS = 32 * WARPS // ROWS
"""So that every thread has its own element: one that shares another's would read its gradient when h is there already."""


def weighted_swiglu(packed: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """[M, F] from packed: [M, 2F], the gate before up, contiguous; weights: [N, K], contiguous; order: [M], the weight of each row.

    Rows without a choice (order -1) are not written.
    """
    h: Tensor = _FORWARD(packed, weights, order)
    return h


def weighted_swiglu_backward(grad_h: Tensor, packed: Tensor, weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of packed [M, 2F] and of the weights, float32 [N, K] (zero for a choice without a row). grad_h: [M, F], contiguous; it
    becomes h.
    """
    grad_packed, grad_weights = _BACKWARD(grad_h, packed, weights, order)
    return grad_packed, grad_weights


@triton.jit
def _gated(packed, rows_R, columns_C, there_RC, hidden):
    """gate, up and sigmoid(gate) in float32."""
    source_RC = packed + rows_R[:, None] * (2 * hidden) + columns_C[None, :]
    gate_RC = tl.load(source_RC, mask=there_RC, other=0.0).to(tl.float32)
    up_RC = tl.load(source_RC + hidden, mask=there_RC, other=0.0).to(tl.float32)
    return gate_RC, up_RC, 1.0 / (1.0 + tl.exp(-gate_RC))


@triton.jit
def _forward_kernel(packed, weights, order, h, num_rows, hidden, R: tl.constexpr, C: tl.constexpr):
    rows_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    choice_R = tl.load(order + rows_R, mask=rows_R < num_rows, other=-1)
    weight_R = tl.load(weights + choice_R, mask=choice_R >= 0, other=0.0).to(tl.float32)
    columns_C = tl.arange(0, C)
    for _ in range(tl.cdiv(hidden, C)):
        there_RC = (choice_R >= 0)[:, None] & (columns_C < hidden)[None, :]
        gate_RC, up_RC, open_RC = _gated(packed, rows_R, columns_C, there_RC, hidden)
        h_RC = weight_R[:, None] * (gate_RC * open_RC * up_RC)
        tl.store(h + rows_R[:, None] * hidden + columns_C[None, :], h_RC.to(h.dtype.element_ty), mask=there_RC)
        columns_C += C


@triton.jit
def _backward_kernel(
    grad_h, packed, weights, order, grad_packed, grad_weights, num_rows, hidden, R: tl.constexpr, C: tl.constexpr
):
    rows_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    choice_R = tl.load(order + rows_R, mask=rows_R < num_rows, other=-1)
    weight_R = tl.load(weights + choice_R, mask=choice_R >= 0, other=0.0).to(tl.float32)
    columns_C = tl.arange(0, C)
    products_RC = tl.zeros((R, C), dtype=tl.float32)
    for _ in range(tl.cdiv(hidden, C)):
        there_RC = (choice_R >= 0)[:, None] & (columns_C < hidden)[None, :]
        gate_RC, up_RC, open_RC = _gated(packed, rows_R, columns_C, there_RC, hidden)
        target_RC = grad_h + rows_R[:, None] * hidden + columns_C[None, :]
        grad_RC = tl.load(target_RC, mask=there_RC, other=0.0).to(tl.float32)
        silu_RC = gate_RC * open_RC
        products_RC += grad_RC * (silu_RC * up_RC)
        tl.store(target_RC, (weight_R[:, None] * (silu_RC * up_RC)).to(grad_h.dtype.element_ty), mask=there_RC)
        grad_RC *= weight_R[:, None]
        grad_gate_RC = grad_RC * up_RC * (open_RC + silu_RC * (1.0 - open_RC))
        packed_RC = grad_packed + rows_R[:, None] * (2 * hidden) + columns_C[None, :]
        tl.store(packed_RC, grad_gate_RC.to(grad_packed.dtype.element_ty), mask=there_RC)
        tl.store(packed_RC + hidden, (grad_RC * silu_RC).to(grad_packed.dtype.element_ty), mask=there_RC)
        columns_C += C
    tl.store(grad_weights + choice_R, tl.sum(products_RC, axis=1), mask=choice_R >= 0)


def _columns(hidden: int) -> int:
    columns: int = max(FEWEST_COLUMNS, min(COLUMNS, triton.next_power_of_2(hidden)))
    return columns


def _forward(packed: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    h = _forward_fake(packed, weights, order)
    _forward_kernel[(triton.cdiv(len(packed), ROWS),)](
        packed, weights, order, h, len(packed), h.shape[1], ROWS, _columns(h.shape[1]),
        num_warps=WARPS,
    )  # fmt: skip
    return h


def _backward(grad_h: Tensor, packed: Tensor, weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    grad_packed, grad_weights = _backward_fake(grad_h, packed, weights, order)
    hidden = grad_h.shape[1]
    _backward_kernel[(triton.cdiv(len(packed), ROWS),)](
        grad_h, packed, weights, order, grad_packed, grad_weights.zero_(), len(packed), hidden,
        ROWS, _columns(hidden), num_warps=WARPS,
    )  # fmt: skip
    return grad_packed, grad_weights


def _forward_fake(packed: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    del weights, order
    return packed.new_empty((packed.shape[0], packed.shape[1] // 2))


def _backward_fake(grad_h: Tensor, packed: Tensor, weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    del grad_h, order
    return torch.empty_like(packed), weights.new_empty(weights.shape, dtype=torch.float32)


_FORWARD = define("expert_gate(Tensor packed, Tensor weights, Tensor order) -> Tensor", _forward, _forward_fake)
_BACKWARD = define(
    "expert_gate_backward(Tensor(a!) grad_h, Tensor packed, Tensor weights, Tensor order) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def builds() -> tuple[Build, ...]:
    """Rows of Qwen3-30B-A3B's experts."""
    types = dict.fromkeys(("packed", "h", "grad_h", "grad_packed"), "*bf16")
    types |= {"weights": "*fp32", "grad_weights": "*fp32", "order": "*i32", "num_rows": "i32", "hidden": "i32"}
    sizes = {"R": ROWS, "C": COLUMNS}
    aligned = ("num_rows", "hidden")
    return (
        Build("experts gate bf16", _forward_kernel, types, sizes, WARPS, aligned=aligned),
        Build("experts gate_backward bf16", _backward_kernel, types, sizes, WARPS, aligned=aligned),
    )
