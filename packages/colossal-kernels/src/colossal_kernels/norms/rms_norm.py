"""`rms_norm` and `add_rms_norm`.

Bytes, E those of one activation: rms_norm 2 E forward and 3 E backward, add_rms_norm 4 E and 4 E, and a float32 row of the weight's
gradient for each program; backward, rows of more than 16384 numbers are read twice, 2 E more. Kept for the backward pass: x (or the sum,
which is an output) and one float32 a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colossal_core.ops import norms as reference
from colossal_kernels.builds import Build
from colossal_kernels.fitting import have_one_a_feature, kernels_take
from colossal_kernels.library import define, differentiate
from colossal_kernels.norms.backward import launch_backward
from colossal_kernels.norms.builds import norm_builds, sum_build
from colossal_kernels.norms.forward import launch_forward
from colossal_kernels.row_layout import num_rows


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0) -> Tensor:
    """`colossal_core.ops.reference.rms_norm`, computed in float32 throughout and rounded once."""
    if not (kernels_take(x, weight) and have_one_a_feature(x, weight)):
        return reference.rms_norm(x, weight, eps, offset=offset)
    y: Tensor = _RMS_NORM(x, weight, eps, offset)[0]
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`colossal_core.ops.reference.add_rms_norm` in one pass; backward adds the gradient that arrives at the sum in its only pass."""
    alike = (x.shape, x.dtype) == (residual.shape, residual.dtype)
    if not (alike and kernels_take(x, residual, weight) and have_one_a_feature(x, weight)):
        return reference.add_rms_norm(x, residual, weight, eps, offset=offset)
    y, total, _ = _ADD_RMS_NORM(x, residual, weight, eps, offset)
    return y, total


def _forward(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = launch_forward(x, None, weight, None, eps, offset, centred=False)
    return y, rstd


def _add_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, _, rstd = launch_forward(x, residual, weight, None, eps, offset, centred=False)
    return y, total, rstd


def _backward(
    grad_y: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    return launch_backward(grad_y, grad_total, x, weight, None, rstd, offset)[:2]


def _forward_fake(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(num_rows(x), dtype=torch.float32)


def _add_forward_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(x), x.new_empty(num_rows(x), dtype=torch.float32)


def _backward_fake(
    grad_y: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(0) if weight is None else _like(weight)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_RMS_NORM = define(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)", _forward, _forward_fake
)
_ADD_RMS_NORM = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    _add_forward,
    _add_forward_fake,
)
_BACKWARD = define(
    "rms_norm_backward(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor? weight, Tensor rstd, float offset)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, _, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_y: Tensor | None, grad_rstd: None) -> tuple[Tensor | None, ...]:
    del grad_rstd
    if grad_y is None:
        return None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = _BACKWARD(grad_y, None, x, weight, rstd, ctx.offset)
    return grad_x, None if weight is None else grad_weight, None, None


def _add_gradients(
    ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, grad_rstd: None
) -> tuple[Tensor | None, ...]:
    del grad_rstd
    if grad_y is None:
        return grad_total, grad_total, None, None, None
    total, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = _BACKWARD(grad_y, grad_total, total, weight, rstd, ctx.offset)
    return grad_x, grad_x, None if weight is None else grad_weight, None, None


differentiate("rms_norm", _gradients, _save)
differentiate("add_rms_norm", _add_gradients, _add_save)


def builds() -> tuple[Build, ...]:
    """What a Llama (4096 features, bf16) launches, the norms of its queries and keys, and rows of three widths."""
    return (
        *norm_builds("rms_norm", "bf16", 4096),
        *norm_builds("rms_norm", "fp32", 4096),
        *norm_builds("rms_norm", "bf16", 128, plain=False),
        *norm_builds("rms_norm", "fp32", 8192),
        *norm_builds("rms_norm", "bf16", 32768),
        *norm_builds("add_rms_norm", "bf16", 16384, added=True),
        *norm_builds("add_rms_norm", "bf16", 4096, added=True),
        sum_build(),
    )
