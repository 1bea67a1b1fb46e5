"""Lion over many tensors in one launch.

g <- clip * grad;  u <- sign(beta1 m + (1 - beta1) g);  p <- (1 - lr * weight_decay) p - lr u;  m <- beta2 m + (1 - beta2) g

Chen et al. 2023, program 1. Bytes an element: `many_tensors.py`; 20 with bf16 gradients and copies beside float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops import lion as reference
from colossal_core.ops.lion import LionSettings
from colossal_core.rounding import Kept
from colossal_kernels.builds import Build
from colossal_kernels.library import define
from colossal_kernels.optimizers import many_tensors
from colossal_kernels.optimizers.lists import Lists


def lion_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Kept],
    *,
    settings: LionSettings,
    clip: Tensor | None = None,
    skip: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    seed: int | None = None,
) -> None:
    """`colossal_core.ops.reference.lion_step`, computed in float32 throughout; what is rounded stochastically draws other numbers."""

    def by_reference(left: Lists) -> None:
        reference.lion_step(
            left.params,
            left.grads,
            *left.moments,
            settings=settings,
            clip=clip,
            skip=skip,
            copies=left.copies,
            seed=seed,
        )

    keep = 1.0 - settings.lr * settings.weight_decay
    numbers = [keep, settings.lr, 1.0 - settings.beta1, 1.0 - settings.beta2]
    lists = Lists(params, grads, (exp_avgs,), copies)
    many_tensors.step_all(_STEP, by_reference, lists, (clip, skip), numbers, seed)


@triton.jit
def rule(
    param, grad, momentum, unused, count, keep, lr, one_minus_beta1, one_minus_beta2, n4, n5, n6, n7
):  # fmt: skip
    difference = grad - momentum
    towards = momentum + difference * one_minus_beta1
    sign = tl.where(towards > 0.0, 1.0, tl.where(towards < 0.0, -1.0, towards))
    return keep * param - lr * sign, momentum + difference * one_minus_beta2, unused


def _launch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    scales: Sequence[Tensor],
    copies: Sequence[Tensor],
    clip: Tensor | None,
    skip: Tensor | None,
    numbers: Sequence[float],
    seed: int | None,
) -> None:
    many_tensors.launch(rule, params, grads, (exp_avgs,), (scales,), copies, (None, clip, skip), numbers, seed)


def _fake(*arguments: object) -> None:
    del arguments


_STEP = define(
    "lion_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] scales, Tensor(d!)[] copies, Tensor? clip, "
    "Tensor? skip, float[] numbers, int? seed) -> ()",
    _launch,
    _fake,
)


def builds() -> tuple[Build, ...]:
    """bf16 gradients and copies beside float32; 8-bit states."""
    half = tl.bfloat16
    return (
        many_tensors.build("lion_step bf16 -> fp32 -> bf16", rule, (tl.float32,), grad=half, copy=half),
        many_tensors.build("lion_step int8 states", rule, (tl.int8,), grad=tl.float32, copy=half),
    )
