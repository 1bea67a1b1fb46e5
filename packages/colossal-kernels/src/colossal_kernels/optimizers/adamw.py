"""AdamW over many tensors in one launch; clipping, unscaling, the skip of an overflow and the copy in the compute dtype in the same pass.

g <- clip * grad;  m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
p <- (1 - lr * weight_decay) p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

Loshchilov and Hutter 2019, algorithm 2. Bytes: `many_tensors.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops import adamw as reference
from colossal_core.ops.adamw import AdamWSettings
from colossal_core.rounding import Kept
from colossal_kernels.builds import Build
from colossal_kernels.library import define
from colossal_kernels.optimizers import many_tensors
from colossal_kernels.optimizers.lists import Lists


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Kept],
    exp_avg_sqs: Sequence[Kept],
    *,
    settings: AdamWSettings,
    step: Tensor,
    clip: Tensor | None = None,
    skip: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    seed: int | None = None,
) -> None:
    """`colossal_core.ops.reference.adamw_step`, computed in float32 throughout; what is rounded stochastically draws other numbers."""

    def by_reference(left: Lists) -> None:
        reference.adamw_step(
            left.params,
            left.grads,
            *left.moments,
            settings=settings,
            step=step,
            clip=clip,
            skip=skip,
            copies=left.copies,
            seed=seed,
        )

    lists = Lists(params, grads, (exp_avgs, exp_avg_sqs), copies)
    many_tensors.step_all(_STEP, by_reference, lists, (step, clip, skip), _numbers(settings), seed)


def _numbers(settings: AdamWSettings) -> list[float]:
    """The scalars of `rule`; logarithms because 1 - beta^step, by a power in float32, would keep few digits in the first steps."""
    return [
        1.0 - settings.lr * settings.weight_decay,
        1.0 - settings.beta1,
        settings.beta2,
        1.0 - settings.beta2,
        settings.lr,
        settings.eps,
        _log(settings.beta1),
        _log(settings.beta2),
    ]


def _log(beta: float) -> float:
    """Of a beta of 0 something whose powers are 0."""
    return math.log(beta) if beta > 0.0 else -200.0


@triton.jit
def _one_minus_power(count, logarithm):
    """1 - exp(count * logarithm), right to float32's last digits also near 0: there by its series."""
    far = count * logarithm
    x = tl.maximum(far, -0.5)
    series = 1.0 + x * (1.0 / 9.0)
    series = 1.0 + x * (1.0 / 8.0) * series
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * (1.0 / 2.0) * series
    return tl.where(far > -0.5, -x * series, 1.0 - tl.exp(far))


@triton.jit
def rule(
    param, grad, first, second, count,
    keep, one_minus_beta1, beta2, one_minus_beta2, lr, eps, log_beta1, log_beta2,
):  # fmt: skip
    count = tl.maximum(count, 1.0)
    step_size = lr / _one_minus_power(count, log_beta1)
    inverse_root = 1.0 / tl.sqrt(_one_minus_power(count, log_beta2))
    first = first + (grad - first) * one_minus_beta1
    second = beta2 * second + one_minus_beta2 * grad * grad
    param = keep * param - step_size * (first / (tl.sqrt(second) * inverse_root + eps))
    return param, first, second


def _launch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    copies: Sequence[Tensor],
    step: Tensor,
    clip: Tensor | None,
    skip: Tensor | None,
    numbers: Sequence[float],
    seed: int | None,
) -> None:
    moments, scales = (exp_avgs, exp_avg_sqs), (exp_avg_scales, exp_avg_sq_scales)
    many_tensors.launch(rule, params, grads, moments, scales, copies, (step, clip, skip), numbers, seed)


def _fake(*arguments: object) -> None:
    del arguments


_STEP = define(
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] exp_avg_scales, "
    "Tensor(e!)[] exp_avg_sq_scales, Tensor(f!)[] copies, Tensor step, Tensor? clip, Tensor? skip, float[] numbers, int? seed) -> ()",
    _launch,
    _fake,
)


def builds() -> tuple[Build, ...]:
    """bf16 gradients and copies beside float32; float32 gradients; 8-bit states; everything in bf16."""
    wide, half = tl.float32, tl.bfloat16
    return (
        many_tensors.build("adamw_step bf16 -> fp32 -> bf16", rule, (wide, wide), grad=half, copy=half),
        many_tensors.build("adamw_step fp32 -> bf16", rule, (wide, wide), grad=wide, copy=half),
        many_tensors.build("adamw_step int8 states", rule, (tl.int8, tl.uint8), grad=wide, copy=half),
        many_tensors.build("adamw_step bf16 states", rule, (half, half), grad=half, param=half),
    )
