"""`swiglu` and `geglu` of two tensors.

Bytes, E those of one activation: 3 E forward, 5 E backward (gradient, gate and up in, two gradients out). Kept for the backward pass: gate
and up; with `overwrite` their gradients are written there, so that no memory is added.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from colossal_core.ops import swiglu as reference
from colossal_core.ops.swiglu import Approximation
from colossal_kernels.builds import Build
from colossal_kernels.fitting import changeable, kernels_take
from colossal_kernels.gates.builds import gate_builds
from colossal_kernels.gates.launches import Gate, launch_backward, launch_forward, like_weights, two_sides
from colossal_kernels.library import define, differentiate


def swiglu(gate: Tensor, up: Tensor, *, weights: Tensor | None = None, overwrite: bool = False) -> Tensor:
    """`colossal_core.ops.reference.swiglu`, computed in float32 and rounded once."""
    if not _fits(gate, up, weights):
        return reference.swiglu(gate, up, weights=weights)
    return cast("Tensor", _GATED(gate, up, weights, "silu", overwrite and changeable(gate) and changeable(up)))


def geglu(
    gate: Tensor,
    up: Tensor,
    *,
    approximate: Approximation = "none",
    weights: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """`colossal_core.ops.reference.geglu`, computed in float32 and rounded once."""
    if not _fits(gate, up, weights):
        return reference.geglu(gate, up, approximate=approximate, weights=weights)
    kind = "gelu_tanh" if approximate == "tanh" else "gelu"
    return cast("Tensor", _GATED(gate, up, weights, kind, overwrite and changeable(gate) and changeable(up)))


def _fits(gate: Tensor, up: Tensor, weights: Tensor | None) -> bool:
    same = gate.shape == up.shape and gate.dtype == up.dtype and gate.dim() > 0
    return same and kernels_take(gate, up, weights) and (weights is None or weights.shape == gate.shape[:-1])


def _gated(gate: Tensor, up: Tensor, weights: Tensor | None, kind: str, overwrite: bool) -> Tensor:
    del overwrite
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    launch_forward(two_sides(gate, up, flat=weights is None), weights, y, Gate(kind))
    return y


def _gated_fake(gate: Tensor, up: Tensor, weights: Tensor | None, kind: str, overwrite: bool) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _backward(
    grad_y: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    flat = weights is None
    grads = [torch.empty_like(side, memory_format=torch.contiguous_format) for side in (gate, up)]
    sides = two_sides(gate, up, flat=flat)
    if sides.rows != 1:
        flat = False
    grad_weights = launch_backward(grad_y, sides, weights, two_sides(grads[0], grads[1], flat=flat), Gate(kind))
    return grads[0], grads[1], grad_weights


def _backward_fake(
    grad_y: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    grad_gate, grad_up = (torch.empty_like(side, memory_format=torch.contiguous_format) for side in (gate, up))
    return grad_gate, grad_up, like_weights(grad_y, weights)


def _backward_in_place(grad_y: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None, kind: str) -> Tensor:
    sides = two_sides(gate, up, flat=weights is None)
    grad_weights = launch_backward(grad_y, sides, weights, sides, Gate(kind))
    for side, read in ((gate, sides.gate), (up, sides.up)):
        if read is not side:
            side.copy_(read)
    return grad_weights


def _backward_in_place_fake(grad_y: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None, kind: str) -> Tensor:
    return like_weights(grad_y, weights)


_GATED = define(
    "gated(Tensor gate, Tensor up, Tensor? weights, str kind, bool overwrite) -> Tensor", _gated, _gated_fake
)
_BACKWARD = define(
    "gated_backward(Tensor grad_y, Tensor gate, Tensor up, Tensor? weights, str kind) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_BACKWARD_IN_PLACE = define(
    "gated_backward_(Tensor grad_y, Tensor(a!) gate, Tensor(b!) up, Tensor? weights, str kind) -> Tensor",
    _backward_in_place,
    _backward_in_place_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    *tensors, ctx.kind, ctx.overwrite = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    gate, up, weights = ctx.saved_tensors
    if ctx.overwrite:
        grad_weights = _BACKWARD_IN_PLACE(grad_y, gate, up, weights, ctx.kind)
        torch.autograd.graph.increment_version((gate, up))
        grad_gate, grad_up = gate.detach(), up.detach()
    else:
        grad_gate, grad_up, grad_weights = _BACKWARD(grad_y, gate, up, weights, ctx.kind)
    return grad_gate, grad_up, None if weights is None else grad_weights, None, None


differentiate("gated", _gradients, _save)


def builds() -> tuple[Build, ...]:
    """A Llama's (one row, as no weights part it), and the experts' of a Qwen3-30B-A3B."""
    return (
        *gate_builds("swiglu", 8192 * 14336, Gate("silu")),
        *gate_builds("geglu", 8192 * 14336, Gate("gelu")),
        *gate_builds("geglu tanh", 8192 * 14336, Gate("gelu_tanh")),
        *gate_builds("swiglu weighted", 768, Gate("silu"), weighted=True),
    )
