"""Core's own optimizers: AdamW and SGD. Both update every element by itself, so that they run on shards of any shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from colossal_core.moments import Moment, Moments, Portion, Update
from colossal_core.ops.adamw import AdamWSettings
from colossal_core.ops.sgd import SGDSettings
from colossal_core.optimizer_state import StateTensor
from colossal_core.optimizers import Groups, OptimizerContext, OptimizerSpec, with_defaults

if TYPE_CHECKING:
    from colossal_core.config import OptimizerConfig

ADAMW_MOMENTS = (Moment("exp_avg"), Moment("exp_avg_sq", positive=True))


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2) through the op `adamw_step`.

    The step count is one 0-d tensor for all parameters, on the device: a skipped step does not advance it.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig, context: OptimizerContext) -> None:
        defaults = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        self.param_groups = with_defaults(groups, defaults)
        self._adamw_step = context.ops["adamw_step"]
        self._step_count = torch.zeros((), dtype=torch.float32, device=context.device)
        self._moments = Moments("adamw", ADAMW_MOMENTS, self.param_groups, config, context)

    @torch.no_grad()
    def clipped_step(self, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        self._step_count.add_(1.0 if skip is None else (~skip).to(self._step_count.dtype))
        self._moments.begin_step()
        for index, group in enumerate(self.param_groups):
            settings = AdamWSettings(
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
            self._moments.step(index, self._update(settings), clip, skip)

    def _update(self, settings: AdamWSettings) -> Update:
        def update(portion: Portion, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
            self._adamw_step(
                portion.masters,
                portion.gradients,
                *portion.moments,
                settings=settings,
                step=self._step_count,
                clip=clip,
                skip=skip,
                copies=portion.copies,
                seed=portion.seed,
            )

        return update

    def state_tensors(self) -> Iterable[StateTensor]:
        yield StateTensor("adamw.step", None, self._step_count)
        yield from self._moments.tensors()


class SGD:
    """Stochastic gradient descent with heavy-ball momentum and L2 weight decay, as torch.optim.SGD has it.

    One departure: the momentum buffer starts at zero instead of at the first gradient, so that it can be saved before the first step;
    with dampening 0 the two are the same.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig, context: OptimizerContext) -> None:
        defaults = {"lr": config.lr, "momentum": config.momentum or 0.0, "weight_decay": config.weight_decay}
        self.param_groups = with_defaults(groups, defaults)
        self._context = context
        self._sgd_step = context.ops["sgd_step"]
        self._momenta = {
            id(master): torch.zeros_like(master, requires_grad=False)
            for group in self.param_groups
            for master in group["params"]
            if group["momentum"]
        }

    @torch.no_grad()
    def clipped_step(self, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        for group in self.param_groups:
            masters = [master for master in group["params"] if self._context.gradient(master) is not None]
            gradients = [gradient for master in masters if (gradient := self._context.gradient(master)) is not None]
            self._sgd_step(
                [master.detach() for master in masters],
                gradients,
                [self._momenta[id(master)] for master in masters] if group["momentum"] else None,
                settings=SGDSettings(group["lr"], group["momentum"], group["weight_decay"]),
                clip=clip,
                skip=skip,
                copies=self._context.copies(masters),
            )

    def state_tensors(self) -> Iterable[StateTensor]:
        for group in self.param_groups:
            for master in group["params"] if group["momentum"] else ():
                yield StateTensor("sgd.momentum", master, self._momenta[id(master)])


ADAMW = OptimizerSpec(
    "adamw",
    AdamW,
    state_elements=lambda config: 2,
    keys=("lr", "betas", "eps", "weight_decay", "no_decay", "states", "masters"),
)
SGD_SPEC = OptimizerSpec(
    "sgd",
    SGD,
    state_elements=lambda config: int(bool(config.momentum)),
    keys=("lr", "momentum", "weight_decay", "no_decay"),
)
