"""`layer_norm` and `add_layer_norm`.

Bytes, E those of one activation: layer_norm 2 E forward and 3 E backward, add_layer_norm 4 E and 4 E, and two float32 rows of gradients of
weight and bias for each program; backward, rows of more than 8192 numbers are read twice, 2 E more. Kept for the backward pass: x (or the
sum, which is an output) and two float32 a row.
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
from colossal_kernels.norms.builds import norm_builds
from colossal_kernels.norms.forward import launch_forward
from colossal_kernels.row_layout import num_rows


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, offset: float = 0.0) -> Tensor:
    """`colossal_core.ops.reference.layer_norm`, computed in float32 throughout and rounded once."""
    if not (kernels_take(x, weight, bias) and have_one_a_feature(x, weight, bias)):
        return reference.layer_norm(x, weight, bias, eps, offset=offset)
    y: Tensor = _LAYER_NORM(x, weight, bias, eps, offset)[0]
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`colossal_core.ops.reference.add_layer_norm` in one pass; backward adds the gradient that arrives at the sum in its only pass."""
    alike = (x.shape, x.dtype) == (residual.shape, residual.dtype)
    if not (alike and kernels_take(x, residual, weight, bias) and have_one_a_feature(x, weight, bias)):
        return reference.add_layer_norm(x, residual, weight, bias, eps, offset=offset)
    y, total, _, _ = _ADD_LAYER_NORM(x, residual, weight, bias, eps, offset)
    return y, total


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = launch_forward(x, None, weight, bias, eps, offset, centred=True)
    return y, mean, rstd


def _add_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(x, residual, weight, bias, eps, offset, centred=True)


def _backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(grad_y, grad_total, x, weight, mean, rstd, offset, bias=bias)


def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _row_numbers(x), _row_numbers(x)


def _add_forward_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(x), _like(x), _row_numbers(x), _row_numbers(x)


def _backward_fake(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _like(x),
        x.new_empty(0) if weight is None else _like(weight),
        x.new_empty(0) if bias is None else _like(bias),
    )


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _row_numbers(x: Tensor) -> Tensor:
    return x.new_empty(num_rows(x), dtype=torch.float32)


_LAYER_NORM = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_ADD_LAYER_NORM = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float offset)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _add_forward,
    _add_forward_fake,
)
_BACKWARD = define(
    "layer_norm_backward(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " float offset) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, ctx.offset = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, bias, _, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight, bias, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_y: Tensor | None, *grad_statistics: None) -> tuple[Tensor | None, ...]:
    del grad_statistics
    if grad_y is None:
        return None, None, None, None, None
    return (*_all_gradients(ctx, grad_y, None), None, None)


def _add_gradients(
    ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, *grad_statistics: None
) -> tuple[Tensor | None, ...]:
    del grad_statistics
    if grad_y is None:
        return grad_total, grad_total, None, None, None, None
    grad_x, grad_weight, grad_bias = _all_gradients(ctx, grad_y, grad_total)
    return grad_x, grad_x, grad_weight, grad_bias, None, None


def _all_gradients(ctx: Any, grad_y: Tensor, grad_total: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of x, weight and bias."""
    x, weight, bias, mean, rstd = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _BACKWARD(grad_y, grad_total, x, weight, bias, mean, rstd, ctx.offset)
    return grad_x, None if weight is None else grad_weight, None if bias is None else grad_bias


differentiate("layer_norm", _gradients, _save)
differentiate("add_layer_norm", _add_gradients, _add_save)


def builds() -> tuple[Build, ...]:
    """What a GPT-2 (1600 features, bf16) launches, and a wide row."""
    return (
        *norm_builds("layer_norm", "bf16", 1600, centred=True),
        *norm_builds("layer_norm", "fp32", 65536, centred=True),
        *norm_builds("add_layer_norm", "fp32", 8192, centred=True, added=True),
    )
