"""A layer of gated experts as one operator, forward and backward: permute, product, gate, product, unpermute.

Between the passes it keeps the packed gate and up [M, 2F] and the order. The permuted inputs [M, D] are made anew in the backward pass
(0.05 ms for Qwen3-30B-A3B, whose layers would keep 134 MB each); the experts' outputs are not needed, since the weights are in the gate.
4096 tokens of Qwen3-30B-A3B (E = 128, K = 8, D = 2048, F = 768): products of 0.93 TFLOP, 1.84 ms by torch's grouped kernel where experts
are balanced, and 0.4 ms for all that is bound by memory.

Formula: `colossal_core.ops.experts.experts`. Letters: N tokens, K choices, E experts, D features, F hidden features, M = N K rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colossal_core.ops import experts as reference
from colossal_kernels.builds import Build
from colossal_kernels.experts import weighted_swiglu as gate
from colossal_kernels.experts.grouped_matmul import grouped_matmul, grouped_outer
from colossal_kernels.experts.order import MOST_EXPERTS, expert_order
from colossal_kernels.experts.rows import MOST_CHOICES, expert_permute, expert_unpermute
from colossal_kernels.experts.weighted_swiglu import weighted_swiglu, weighted_swiglu_backward
from colossal_kernels.fitting import kernels_take
from colossal_kernels.library import define, differentiate


def experts(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """`colossal_core.ops.reference.experts`."""
    same = x.dtype == gate_up.dtype == down.dtype and kernels_take(x, gate_up, down, weights)
    some = min(chosen.numel(), gate_up.numel()) > 0 and len(gate_up) <= MOST_EXPERTS
    if not same or not some or chosen.shape[1] > MOST_CHOICES or chosen.dtype not in (torch.int32, torch.int64):
        return reference.experts(x, gate_up, down, chosen, weights)
    y: Tensor = _FORWARD(x, gate_up, down, chosen, weights)[0]
    return y


def _forward(
    x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    order, inverse, offsets = expert_order(chosen, len(gate_up))
    packed = grouped_matmul(expert_permute(x, order, inverse), gate_up.transpose(1, 2), offsets)
    h = weighted_swiglu(packed, weights.contiguous(), order)
    rows = grouped_matmul(h, down.transpose(1, 2), offsets)
    return expert_unpermute(rows, order, inverse), packed, order, inverse, offsets


def _backward(
    grad_y: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, packed: Tensor,
    order: Tensor, inverse: Tensor, offsets: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    want_x, want_gate_up, want_down = wanted
    grad_down, grad_gate_up, grad_x = down.new_empty(0), gate_up.new_empty(0), x.new_empty(0)
    grad_rows = expert_permute(grad_y, order, inverse)
    h = grouped_matmul(grad_rows, down, offsets)  # the gradient of h, until the gate writes h over it
    grad_packed, grad_weights = weighted_swiglu_backward(h, packed, weights.contiguous(), order)
    if want_down:
        grad_down = grouped_outer(grad_rows, h, offsets)
    del grad_rows, h
    if want_gate_up:
        grad_gate_up = grouped_outer(grad_packed, expert_permute(x, order, inverse), offsets)
    if want_x:
        grad_x = expert_unpermute(grouped_matmul(grad_packed, gate_up, offsets), order, inverse)
    return grad_x, grad_gate_up, grad_down, grad_weights.to(weights.dtype)


def _forward_fake(
    x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    del down, weights
    rows = chosen.shape[0] * chosen.shape[1]
    packed, y = x.new_empty((rows, gate_up.shape[1])), x.new_empty(x.shape)
    order, offsets = (chosen.new_empty(size, dtype=torch.int32) for size in (rows, gate_up.shape[0] + 1))
    return y, packed, order, chosen.new_empty(chosen.shape, dtype=torch.int32), offsets


def _backward_fake(
    grad_y: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, packed: Tensor,
    order: Tensor, inverse: Tensor, offsets: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    del grad_y, packed, order, inverse, offsets
    made = [t.new_empty(t.shape if want else 0) for t, want in zip((x, gate_up, down), wanted, strict=True)]
    return made[0], made[1], made[2], weights.new_empty(weights.shape)


_FORWARD = define(
    "experts(Tensor x, Tensor gate_up, Tensor down, Tensor chosen, Tensor weights)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_BACKWARD = define(
    "experts_backward(Tensor grad_y, Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor packed, Tensor order,"
    " Tensor inverse, Tensor offsets, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate_up, down, _, weights = inputs
    ctx.save_for_backward(x, gate_up, down, weights, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_y: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    del others
    if grad_y is None:
        return (None,) * 5
    wanted = list(ctx.needs_input_grad[:3])
    *first, grad_weights = _BACKWARD(grad_y, *ctx.saved_tensors, wanted)
    found = [grad if want else None for grad, want in zip(first, wanted, strict=True)]
    return (*found, None, grad_weights)


differentiate("experts", _gradients, _save)


def builds() -> tuple[Build, ...]:
    """The gate's; the others stand beside their own ops."""
    return gate.builds()
