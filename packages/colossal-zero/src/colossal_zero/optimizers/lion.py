"""Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms", program 1): the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from colossal_core.moments import Moment, Moments
from colossal_core.optimizer_state import StateTensor
from colossal_core.optimizers import Groups, OptimizerContext, OptimizerSpec, with_defaults
from colossal_core.tensor_lists import Tensors, assign_unless, bounded_groups, clipped

if TYPE_CHECKING:
    from colossal_core.config import OptimizerConfig

COMPARED = 1e-8
"""Under fp64, which is for comparisons, momenta below this have less than a whole sign: some gradients are zero in theory (of a key bias),
and the sign of their rounding error would differ with the order of every sum."""


class Lion:
    """For every element by itself, so on any shard:

    u <- sign(beta1 m + (1 - beta1) g);  p <- (1 - lr * weight_decay) p - lr u;  m <- beta2 m + (1 - beta2) g

    The authors advise a rate 3 to 10 times smaller than AdamW's, and as much more weight decay. Nothing is communicated.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig, context: OptimizerContext) -> None:
        defaults = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
        self.param_groups = with_defaults(groups, defaults)
        self._moments = Moments("lion", (Moment("exp_avg"),), self.param_groups, config, context)

    @torch.no_grad()
    def clipped_step(self, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        self._moments.begin_step()
        for index, group in enumerate(self.param_groups):
            self._moments.step(index, _update(group), clip, skip)

    def state_tensors(self) -> Iterable[StateTensor]:
        return self._moments.tensors()


def _update(group: dict[str, Any]) -> Any:
    lr, (beta1, beta2), weight_decay = group["lr"], group["betas"], group["weight_decay"]

    def update(
        masters: Tensors,
        gradients: Tensors,
        moments: Sequence[Tensors],
        clip: torch.Tensor | None,
        skip: torch.Tensor | None,
    ) -> None:
        for some, raw, momenta in bounded_groups(masters, gradients, moments[0]):
            gradient = clipped(raw, clip)
            direction = list(torch._foreach_lerp(momenta, gradient, 1.0 - beta1))
            _sign_(direction)
            kept = list(torch._foreach_mul(some, 1.0 - lr * weight_decay))
            torch._foreach_add_(kept, direction, alpha=-lr)
            assign_unless(skip, some, kept)
            assign_unless(skip, momenta, torch._foreach_lerp(momenta, gradient, 1.0 - beta2))

    return update


def _sign_(tensors: Tensors) -> None:
    """The sign, in place. Under fp64, clamp(u / COMPARED, -1, 1)."""
    if tensors[0].dtype != torch.float64:
        torch._foreach_sign_(tensors)
        return
    torch._foreach_div_(tensors, COMPARED)
    torch._foreach_clamp_min_(tensors, -1.0)
    torch._foreach_clamp_max_(tensors, 1.0)


LION = OptimizerSpec(
    "lion",
    Lion,
    state_elements=lambda config: 1,
    keys=("lr", "betas", "weight_decay", "no_decay", "states", "masters"),
)
