"""The AdamW step over lists of tensors: its reference, and the same in one kernel of torch's. The `torch._foreach_*` names are private to
torch; tried on 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from colossal_core._torch_private import fused_adamw
from colossal_core.ops.narrow import must_be_widened, plain, update_in_float32
from colossal_core.rounding import Kept
from colossal_core.tensor_lists import Tensors, bounded_groups, clipped


@dataclass(frozen=True)
class AdamWSettings:
    """lr: step size; beta1, beta2: decay of the first and second moment; eps: added to the root; weight_decay:
    decoupled, times lr.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        # A skipped step multiplies the update by zero, which only removes it where it is finite.
        assert self.eps > 0.0, f"eps={self.eps}"


@dataclass(frozen=True)
class _Factors:
    """0-d tensors in the masters' dtype: decay of parameters and of the second moment, step size and root of the
    second correction.
    """

    keep: torch.Tensor
    beta2: torch.Tensor
    one_minus_beta1: torch.Tensor
    minus_step_size: torch.Tensor
    root_correction: torch.Tensor


def adamw_step(  # noqa: PLR0913 - one pass over all that a step is
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[Kept],
    exp_avg_sqs: Sequence[Kept],
    *,
    settings: AdamWSettings,
    step: torch.Tensor,
    clip: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    copies: Sequence[torch.Tensor] | None = None,
    seed: int | None = None,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2), in place on params, exp_avgs and exp_avg_sqs; never
    on grads.

        g <- clip * grad;  m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
        p <- (1 - lr * weight_decay) p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

    The lists agree in length, and item by item in shape and device; any shape, so flat shards too. Each list is of one
    dtype: grads and moments may be narrower than params, moments `Coded` too. step: 0-d, the number of this update, 1
    for the first; it is only read. clip: 0-d factor on every gradient, of clipping and unscaling. skip: 0-d bool; where
    it is True nothing changes, whatever the gradients or `clip` hold, and the caller does not count the step. copies:
    get params' values after the step, to the nearest in their dtype; in a skipped step too. seed: bf16 params and
    moments, and codes, are rounded stochastically, by it alone; without one, to the nearest, and nothing is coded.
    Everything stays on the device: the host never waits.

    Least bytes an element: those of the gradient once, of parameter and moments twice, of the copy once: 28 for a
    bf16 gradient, float32 parameter and moments and a bf16 copy.
    """
    _step(_update_by_lists, params, grads, (exp_avgs, exp_avg_sqs), settings, step, clip, skip, copies, seed)


def adamw_step_fused(  # noqa: PLR0913 - as the reference
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[Kept],
    exp_avg_sqs: Sequence[Kept],
    *,
    settings: AdamWSettings,
    step: torch.Tensor,
    clip: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    copies: Sequence[torch.Tensor] | None = None,
    seed: int | None = None,
) -> None:
    """`adamw_step` by torch's fused kernel: one pass over the states, and before it one over the gradients where they are clipped or
    narrower, after it one for the copies.

    Clipped gradients are copies, of at most `GROUP_ELEMENTS` at a time: the kernel's own scaling would overwrite the raw ones.
    """
    _step(_update_by_torchs_kernel, params, grads, (exp_avgs, exp_avg_sqs), settings, step, clip, skip, copies, seed)


_Update = Callable[
    [
        Sequence[torch.Tensor],
        Sequence[torch.Tensor],
        Sequence[Sequence[torch.Tensor]],
        AdamWSettings,
        torch.Tensor,
        "torch.Tensor | None",
        "torch.Tensor | None",
    ],
    None,
]


def _step(  # noqa: PLR0913 - as the reference
    update: _Update,
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    moments: tuple[Sequence[Kept], Sequence[Kept]],
    settings: AdamWSettings,
    step: torch.Tensor,
    clip: torch.Tensor | None,
    skip: torch.Tensor | None,
    copies: Sequence[torch.Tensor] | None,
    seed: int | None,
) -> None:
    assert len(params) == len(grads) == len(moments[0]) == len(moments[1]), "lists of one length"
    if not params:
        return

    def widened(masters: Tensors, gradients: Tensors, states: Sequence[Sequence[torch.Tensor]]) -> None:
        update(masters, gradients, states, settings, step, clip, skip)

    if must_be_widened(params, moments, seed):
        update_in_float32(widened, params, grads, moments, skip, seed)
    else:
        widened(list(params), list(grads), [plain(moment) for moment in moments])
    if copies is not None:
        torch._foreach_copy_(list(copies), list(params))


def _update_by_torchs_kernel(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    moments: Sequence[Sequence[torch.Tensor]],
    settings: AdamWSettings,
    step: torch.Tensor,
    clip: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> None:
    count = step.to(device=params[0].device, dtype=torch.float32).clamp(min=1.0)
    found_inf = None if skip is None else skip.to(device=params[0].device, dtype=torch.float32)
    numbers = (settings.lr, settings.beta1, settings.beta2, settings.weight_decay, settings.eps)
    for group, raw, first, second in bounded_groups(params, grads, *moments):
        gradients = clipped(raw, clip, group[0].dtype)
        fused_adamw((group, gradients, first, second), [count] * len(group), numbers, found_inf)


def _update_by_lists(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    moments: Sequence[Sequence[torch.Tensor]],
    settings: AdamWSettings,
    step: torch.Tensor,
    clip: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> None:
    factors = _factors(settings, step, skip, params[0].dtype)
    for group, raw, first, second in bounded_groups(params, grads, *moments):
        gradients = clipped(raw, clip, group[0].dtype)
        if skip is not None:
            gradients = [gradient.masked_fill(skip, 0.0) for gradient in gradients]
        _update(group, gradients, first, second, settings, factors)


def _factors(settings: AdamWSettings, step: torch.Tensor, skip: torch.Tensor | None, dtype: torch.dtype) -> _Factors:
    count = step.to(torch.float64).clamp(min=1.0)
    first_correction = 1.0 - settings.beta1**count
    root_correction = (1.0 - settings.beta2**count).sqrt()

    def unless_skipped(value: torch.Tensor, otherwise: float) -> torch.Tensor:
        return (value if skip is None else value.masked_fill(skip, otherwise)).to(dtype)

    def constant(value: float) -> torch.Tensor:
        return torch.full_like(count, value)

    return _Factors(
        keep=unless_skipped(constant(1.0 - settings.lr * settings.weight_decay), 1.0),
        beta2=unless_skipped(constant(settings.beta2), 1.0),
        one_minus_beta1=unless_skipped(constant(1.0 - settings.beta1), 0.0),
        minus_step_size=unless_skipped(-settings.lr / first_correction, 0.0),
        root_correction=root_correction.to(dtype),
    )


def _update(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    settings: AdamWSettings,
    factors: _Factors,
) -> None:
    torch._foreach_mul_(exp_avg_sqs, factors.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1.0 - settings.beta2)
    towards = list(torch._foreach_sub(grads, exp_avgs))
    torch._foreach_mul_(towards, factors.one_minus_beta1)
    torch._foreach_add_(exp_avgs, towards)
    del towards
    denominators = list(torch._foreach_sqrt(exp_avg_sqs))
    torch._foreach_div_(denominators, factors.root_correction)
    torch._foreach_add_(denominators, settings.eps)
    updates = list(torch._foreach_div(exp_avgs, denominators))
    torch._foreach_mul_(updates, factors.minus_step_size)
    torch._foreach_mul_(params, factors.keep)
    torch._foreach_add_(params, updates)
