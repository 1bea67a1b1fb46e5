"""The step of gradient descent with momentum over lists of tensors. The `torch._foreach_*` names are private to torch; tried on 2.11 and
2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from colossal_core.tensor_lists import Tensors, assign_unless, bounded_groups, clipped


@dataclass(frozen=True)
class SGDSettings:
    """lr: step size; momentum: decay of the sum of gradients; weight_decay: L2, added to the gradient."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0


def sgd_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor] | None,
    *,
    settings: SGDSettings,
    clip: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    copies: Sequence[torch.Tensor] | None = None,
) -> None:
    """One step of stochastic gradient descent with heavy-ball momentum (Polyak 1964) as torch.optim.SGD has it, dampening 0; in place on
    params and momenta.

        g <- clip * grad + weight_decay p;  m <- momentum m + g;  p <- p - lr m

    momenta: of params' dtype; None: without (m is g). Lists, clip, skip and copies as `adamw_step` has them. Least bytes an element: 20 for
    a bf16 gradient, float32 parameter and momentum and a bf16 copy; 12 without momentum.
    """
    assert len(params) == len(grads) and (momenta is None or len(momenta) == len(params)), "lists of one length"
    if not params:
        return
    if momenta is None:
        for some, raw in bounded_groups(params, grads):
            _update(some, clipped(raw, clip, some[0].dtype), None, settings, skip)
    else:
        for some, raw, buffers in bounded_groups(params, grads, momenta):
            _update(some, clipped(raw, clip, some[0].dtype), buffers, settings, skip)
    if copies is not None:
        torch._foreach_copy_(list(copies), list(params))


def _update(
    params: Tensors, update: Tensors, momenta: Tensors | None, settings: SGDSettings, skip: torch.Tensor | None
) -> None:
    if settings.weight_decay:
        update = list(torch._foreach_add(update, params, alpha=settings.weight_decay))
    if momenta is not None:
        update = list(torch._foreach_add(torch._foreach_mul(momenta, settings.momentum), update))
        assign_unless(skip, momenta, update)
    assign_unless(skip, params, torch._foreach_add(params, update, alpha=-settings.lr))
