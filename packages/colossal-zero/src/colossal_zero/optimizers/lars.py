"""LARS (You, Gitman and Ginsburg 2017, "Large batch training of convolutional networks", algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from colossal_core.optimizer_state import StateTensor
from colossal_core.optimizers import Groups, OptimizerContext, OptimizerSpec, with_defaults
from colossal_core.tensor_lists import Tensors, assign_unless, bounded_groups, clipped
from colossal_zero.optimizers.sums import SquareNorms, gradients_of, local_squares

if TYPE_CHECKING:
    from colossal_core.config import OptimizerConfig

DEFAULT_MOMENTUM = 0.9


class Lars:
    """Momentum, with a rate for each parameter that makes its step a share of its own norm:

    r = trust_coefficient |p| / (|g| + weight_decay |p| + eps);  v <- momentum v + lr r (g + weight_decay p);  p <- p - v

    Norms are those of the whole parameter and of its clipped gradient; r is 1 where one of them is 0, and for parameters that `no_decay`
    leaves out, as in the authors' code.

    Communication: one all-reduce over the axes that cut the state, of two numbers a parameter.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig, context: OptimizerContext) -> None:
        defaults = {
            "lr": config.lr,
            "momentum": DEFAULT_MOMENTUM if config.momentum is None else config.momentum,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            "trust_coefficient": config.trust_coefficient,
        }
        self.param_groups = with_defaults(groups, defaults)
        self._context = context
        self._velocities = {
            id(master): torch.zeros_like(master, requires_grad=False)
            for group in self.param_groups
            for master in group["params"]
        }
        self._norms = [
            SquareNorms(group["params"], 2, context) if group["decayed"] else None for group in self.param_groups
        ]

    @torch.no_grad()
    def clipped_step(self, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        for group, norms in zip(self.param_groups, self._norms, strict=True):
            masters: Tensors = group["params"]
            gradients = gradients_of(masters, self._context)
            rates = masters[0].new_full((len(masters),), group["lr"])
            if norms is not None:
                rates = rates * self._ratios(group, norms, gradients, clip)
            velocities = [self._velocities[id(master)] for master in masters]
            each = [rate.expand_as(master) for rate, master in zip(rates, masters, strict=True)]
            for some, raw, velocity, rate in bounded_groups(masters, gradients, velocities, each):
                update = clipped(raw, clip)
                if group["weight_decay"]:
                    update = list(torch._foreach_add(update, some, alpha=group["weight_decay"]))
                fresh = list(torch._foreach_mul(velocity, group["momentum"]))
                torch._foreach_addcmul_(fresh, update, rate)
                assign_unless(skip, velocity, fresh)
                assign_unless(skip, some, torch._foreach_sub(some, fresh))

    def _ratios(
        self, group: dict[str, Any], norms: SquareNorms, gradients: Tensors, clip: torch.Tensor | None
    ) -> torch.Tensor:
        """r of each master of the group: one vector."""
        found = norms.of([local_squares(group["params"]), local_squares(gradients)], "trust ratios")
        of_masters, of_gradients = found[0].sqrt(), found[1].sqrt()
        if clip is not None:
            of_gradients = of_gradients * clip.to(of_gradients.dtype)
        whole = of_gradients + group["weight_decay"] * of_masters + group["eps"]
        ratio = group["trust_coefficient"] * of_masters / whole
        return torch.where((of_masters > 0) & (of_gradients > 0), ratio, 1.0)

    def state_tensors(self) -> Iterable[StateTensor]:
        for group in self.param_groups:
            for master in group["params"]:
                yield StateTensor("lars.velocity", master, self._velocities[id(master)])


LARS = OptimizerSpec(
    "lars",
    Lars,
    state_elements=lambda config: 1,
    keys=("lr", "momentum", "eps", "weight_decay", "no_decay", "trust_coefficient"),
    on_shards="aware",
)
