"""`packed_swiglu` and `packed_geglu` of one tensor that holds gate and up: in halves or in turn.

Bytes, E those of the result: 3 E forward, 5 E backward, whose gradient is one tensor as well (two gradients and their concatenation would
move 9 E). Kept for the backward pass: the argument; with `overwrite` its gradient is written there, so that no memory is added.
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
from colossal_kernels.gates.launches import Gate, launch_backward, launch_forward, like_weights, packed_sides
from colossal_kernels.library import define, differentiate


def packed_swiglu(
    gate_up: Tensor,
    *,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    shift: float = 0.0,
    weights: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """`colossal_core.ops.reference.packed_swiglu`, computed in float32 and rounded once."""
    if not _fits(gate_up, weights):
        return reference.packed_swiglu(
            gate_up, interleaved=interleaved, alpha=alpha, limit=limit, shift=shift, weights=weights
        )
    overwrite = overwrite and changeable(gate_up)
    return cast("Tensor", _PACKED(gate_up, weights, "silu", interleaved, alpha, limit, shift, overwrite))


def packed_geglu(
    gate_up: Tensor,
    *,
    interleaved: bool = False,
    approximate: Approximation = "none",
    weights: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """`colossal_core.ops.reference.packed_geglu`, computed in float32 and rounded once."""
    if not _fits(gate_up, weights):
        return reference.packed_geglu(gate_up, interleaved=interleaved, approximate=approximate, weights=weights)
    kind = "gelu_tanh" if approximate == "tanh" else "gelu"
    overwrite = overwrite and changeable(gate_up)
    return cast("Tensor", _PACKED(gate_up, weights, kind, interleaved, 1.0, None, 0.0, overwrite))


def _fits(gate_up: Tensor, weights: Tensor | None) -> bool:
    shaped = gate_up.dim() > 0 and gate_up.shape[-1] % 2 == 0
    return shaped and kernels_take(gate_up, weights) and (weights is None or weights.shape == gate_up.shape[:-1])


def _flat(gate_up: Tensor, weights: Tensor | None) -> bool:
    """Whether it is nothing but a list of pairs where gate and up are in turn."""
    return weights is None and gate_up.is_contiguous()


def _packed(
    gate_up: Tensor,
    weights: Tensor | None,
    kind: str,
    interleaved: bool,
    alpha: float,
    limit: float | None,
    shift: float,
    overwrite: bool,
) -> Tensor:
    y = _packed_fake(gate_up, weights, kind, interleaved, alpha, limit, shift, overwrite)
    sides = packed_sides(gate_up, interleaved, flat=_flat(gate_up, weights))
    launch_forward(sides, weights, y, Gate(kind, interleaved, alpha, limit, shift))
    return y


def _packed_fake(
    gate_up: Tensor,
    weights: Tensor | None,
    kind: str,
    interleaved: bool,
    alpha: float,
    limit: float | None,
    shift: float,
    overwrite: bool,
) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _backward(
    grad_y: Tensor,
    gate_up: Tensor,
    weights: Tensor | None,
    kind: str,
    interleaved: bool,
    alpha: float,
    limit: float | None,
    shift: float,
) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    gate = Gate(kind, interleaved, alpha, limit, shift)
    flat = _flat(gate_up, weights)
    sides, grads = (packed_sides(tensor, interleaved, flat=flat) for tensor in (gate_up, grad))
    return grad, launch_backward(grad_y, sides, weights, grads, gate)


def _backward_fake(
    grad_y: Tensor,
    gate_up: Tensor,
    weights: Tensor | None,
    kind: str,
    interleaved: bool,
    alpha: float,
    limit: float | None,
    shift: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format), like_weights(grad_y, weights)


def _backward_in_place(
    grad_y: Tensor,
    gate_up: Tensor,
    weights: Tensor | None,
    kind: str,
    interleaved: bool,
    alpha: float,
    limit: float | None,
    shift: float,
) -> Tensor:
    sides = packed_sides(gate_up, interleaved, flat=_flat(gate_up, weights))
    grad_weights = launch_backward(grad_y, sides, weights, sides, Gate(kind, interleaved, alpha, limit, shift))
    if sides.gate is not gate_up:
        gate_up.copy_(sides.gate)
    return grad_weights


def _backward_in_place_fake(
    grad_y: Tensor,
    gate_up: Tensor,
    weights: Tensor | None,
    kind: str,
    interleaved: bool,
    alpha: float,
    limit: float | None,
    shift: float,
) -> Tensor:
    return like_weights(grad_y, weights)


_HOW = "Tensor? weights, str kind, bool interleaved, float alpha, float? limit, float shift"
_PACKED = define(f"packed_gated(Tensor gate_up, {_HOW}, bool overwrite) -> Tensor", _packed, _packed_fake)
_BACKWARD = define(
    f"packed_gated_backward(Tensor grad_y, Tensor gate_up, {_HOW}) -> (Tensor, Tensor)", _backward, _backward_fake
)
_BACKWARD_IN_PLACE = define(
    f"packed_gated_backward_(Tensor grad_y, Tensor(a!) gate_up, {_HOW}) -> Tensor",
    _backward_in_place,
    _backward_in_place_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    gate_up, weights, *ctx.how, ctx.overwrite = inputs
    ctx.save_for_backward(gate_up, weights)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    gate_up, weights = ctx.saved_tensors
    if ctx.overwrite:
        grad_weights = _BACKWARD_IN_PLACE(grad_y, gate_up, weights, *ctx.how)
        torch.autograd.graph.increment_version(gate_up)
        grad = gate_up.detach()
    else:
        grad, grad_weights = _BACKWARD(grad_y, gate_up, weights, *ctx.how)
    return grad, None if weights is None else grad_weights, *[None] * 6


differentiate("packed_gated", _gradients, _save)


def builds() -> tuple[Build, ...]:
    """Of a Phi-3 (8192 features), gpt-oss (clamped; one row, as no weights part it) and weighted experts of 768."""
    return (
        *gate_builds("packed_swiglu", 8192, Gate("silu")),
        *gate_builds("packed_swiglu weighted", 768, Gate("silu"), weighted=True),
        *gate_builds("packed_swiglu gpt-oss", 16384 * 2880, Gate("silu", True, 1.702, 7.0, 1.0)),
        *gate_builds("packed_geglu", 16384, Gate("gelu_tanh")),
    )
