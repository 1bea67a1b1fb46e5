"""Gradient descent with heavy-ball momentum over many tensors in one launch.

g <- clip * grad + weight_decay p;  m <- momentum m + g;  p <- p - lr m

Polyak 1964, as torch.optim.SGD has it. Bytes an element: `many_tensors.py`; 20 with bf16 gradients and copies beside float32, 12 without
momentum.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops import sgd as reference
from colossal_core.ops.sgd import SGDSettings
from colossal_kernels.builds import Build
from colossal_kernels.library import define
from colossal_kernels.optimizers import many_tensors
from colossal_kernels.optimizers.lists import Lists


def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    *,
    settings: SGDSettings,
    clip: Tensor | None = None,
    skip: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """`colossal_core.ops.reference.sgd_step`, computed in float32 throughout."""

    def by_reference(left: Lists) -> None:
        buffers = None if momenta is None else [kept for kept in left.moments[0] if isinstance(kept, Tensor)]
        reference.sgd_step(
            left.params, left.grads, buffers, settings=settings, clip=clip, skip=skip, copies=left.copies
        )

    lists = Lists(params, grads, () if momenta is None else (momenta,), copies)
    numbers = [settings.lr, settings.momentum, settings.weight_decay]
    operator = _PLAIN if momenta is None else _STEP
    many_tensors.step_all(operator, by_reference, lists, (clip, skip), numbers, None)


@triton.jit
def rule(param, grad, momentum, unused, count, lr, decay, weight_decay, n3, n4, n5, n6, n7):
    momentum = decay * momentum + (grad + weight_decay * param)
    return param - lr * momentum, momentum, unused


@triton.jit
def plain_rule(param, grad, unused, unused_too, count, lr, decay, weight_decay, n3, n4, n5, n6, n7):
    return param - lr * (grad + weight_decay * param), unused, unused_too


def _launch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    scales: Sequence[Tensor],
    copies: Sequence[Tensor],
    clip: Tensor | None,
    skip: Tensor | None,
    numbers: Sequence[float],
    seed: int | None,
) -> None:
    many_tensors.launch(rule, params, grads, (momenta,), (scales,), copies, (None, clip, skip), numbers, seed)


def _launch_plain(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    copies: Sequence[Tensor],
    clip: Tensor | None,
    skip: Tensor | None,
    numbers: Sequence[float],
    seed: int | None,
) -> None:
    many_tensors.launch(plain_rule, params, grads, (), (), copies, (None, clip, skip), numbers, seed)


def _fake(*arguments: object) -> None:
    del arguments


_STEP = define(
    "sgd_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] scales, Tensor(d!)[] copies, Tensor? clip, "
    "Tensor? skip, float[] numbers, int? seed) -> ()",
    _launch,
    _fake,
)
_PLAIN = define(
    "plain_sgd_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] copies, Tensor? clip, Tensor? skip, float[] numbers, "
    "int? seed) -> ()",
    _launch_plain,
    _fake,
)


def builds() -> tuple[Build, ...]:
    """bf16 gradients and copies beside float32."""
    half = tl.bfloat16
    return (many_tensors.build("sgd_step bf16 -> fp32 -> bf16", rule, (tl.float32,), grad=half, copy=half),)
