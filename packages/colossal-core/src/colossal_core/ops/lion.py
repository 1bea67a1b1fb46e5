"""The Lion step over lists of tensors. The `torch._foreach_*` names are private to torch; tried on 2.11 and 2.13."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from colossal_core.ops.narrow import must_be_widened, plain, update_in_float32
from colossal_core.rounding import Kept
from colossal_core.tensor_lists import Tensors, assign_unless, bounded_groups, clipped

COMPARED = 1e-8
"""Under fp64, which is for comparisons, momenta below this have less than a whole sign: some gradients are zero in theory (of a key bias),
and the sign of their rounding error would differ with the order of every sum."""


@dataclass(frozen=True)
class LionSettings:
    """lr: step size; beta1: weight of the momentum in the direction; beta2: decay of the momentum; weight_decay:
    decoupled, times lr.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0


def lion_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[Kept],
    *,
    settings: LionSettings,
    clip: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    copies: Sequence[torch.Tensor] | None = None,
    seed: int | None = None,
) -> None:
    """One step of Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms", program 1), in place on params and exp_avgs.

        g <- clip * grad;  u <- sign(beta1 m + (1 - beta1) g)
        p <- (1 - lr * weight_decay) p - lr u;  m <- beta2 m + (1 - beta2) g

    Lists, clip, skip, copies and seed as `adamw_step` has them. Least bytes an element: 20 for a bf16 gradient, float32 parameter and
    momentum and a bf16 copy.
    """
    assert len(params) == len(grads) == len(exp_avgs), "lists of one length"
    if not params:
        return

    def update(masters: Tensors, gradients: Tensors, moments: Sequence[Tensors]) -> None:
        for some, raw, momenta in bounded_groups(masters, gradients, moments[0]):
            _update(some, clipped(raw, clip, some[0].dtype), momenta, settings, skip)

    if must_be_widened(params, [exp_avgs], seed):
        update_in_float32(update, params, grads, [exp_avgs], skip, seed)
    else:
        update(list(params), list(grads), [plain(exp_avgs)])
    if copies is not None:
        torch._foreach_copy_(list(copies), list(params))


def _update(
    params: Tensors, grads: Tensors, momenta: Tensors, settings: LionSettings, skip: torch.Tensor | None
) -> None:
    direction = list(torch._foreach_lerp(momenta, grads, 1.0 - settings.beta1))
    _sign_(direction)
    kept = list(torch._foreach_mul(params, 1.0 - settings.lr * settings.weight_decay))
    torch._foreach_add_(kept, direction, alpha=-settings.lr)
    assign_unless(skip, params, kept)
    assign_unless(skip, momenta, torch._foreach_lerp(momenta, grads, 1.0 - settings.beta2))


def _sign_(tensors: Tensors) -> None:
    """The sign, in place. Under fp64, clamp(u / COMPARED, -1, 1)."""
    if tensors[0].dtype != torch.float64:
        torch._foreach_sign_(tensors)
        return
    torch._foreach_div_(tensors, COMPARED)
    torch._foreach_clamp_min_(tensors, -1.0)
    torch._foreach_clamp_max_(tensors, 1.0)
