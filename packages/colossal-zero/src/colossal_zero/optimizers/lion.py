"""Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms", program 1): the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from colossal_core.moments import Moment, Moments, Portion, Update
from colossal_core.ops.lion import LionSettings
from colossal_core.optimizer_state import StateTensor
from colossal_core.optimizers import Groups, OptimizerContext, OptimizerSpec, with_defaults

if TYPE_CHECKING:
    from colossal_core.config import OptimizerConfig


class Lion:
    """For every element by itself, so on any shard, through the op `lion_step`:

    u <- sign(beta1 m + (1 - beta1) g);  p <- (1 - lr * weight_decay) p - lr u;  m <- beta2 m + (1 - beta2) g

    The authors advise a rate 3 to 10 times smaller than AdamW's, and as much more weight decay. Nothing is communicated.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig, context: OptimizerContext) -> None:
        defaults = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
        self.param_groups = with_defaults(groups, defaults)
        self._lion_step = context.ops["lion_step"]
        self._moments = Moments("lion", (Moment("exp_avg"),), self.param_groups, config, context)

    @torch.no_grad()
    def clipped_step(self, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        self._moments.begin_step()
        for index, group in enumerate(self.param_groups):
            betas: tuple[float, float] = group["betas"]
            settings = LionSettings(group["lr"], *betas, weight_decay=group["weight_decay"])
            self._moments.step(index, self._update(settings), clip, skip)

    def _update(self, settings: LionSettings) -> Update:
        def update(portion: Portion, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
            self._lion_step(
                portion.masters,
                portion.gradients,
                *portion.moments,
                settings=settings,
                clip=clip,
                skip=skip,
                copies=portion.copies,
                seed=portion.seed,
            )

        return update

    def state_tensors(self) -> Iterable[StateTensor]:
        return self._moments.tensors()


LION = OptimizerSpec(
    "lion",
    Lion,
    state_elements=lambda config: 1,
    keys=("lr", "betas", "weight_decay", "no_decay", "states", "masters"),
)
