"""LAMB (You et al. 2020, "Large batch optimization for deep learning: training BERT in 76 minutes", algorithm 2)."""

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


class Lamb:
    """Adam's direction, scaled so that each parameter moves by lr times its own norm:

    m, v as in AdamW, both corrected;  u = m / (sqrt(v) + eps) + weight_decay p;  p <- p - lr * |p| / |u| * u

    |p| and |u| are norms of the whole parameter, whatever of it lies here; the ratio is 1 where one of them is 0. Parameters that
    `no_decay` leaves out are updated with ratio 1, as in the authors' code. The ratio is not bounded (phi is the identity).

    Communication: one all-reduce over the axes that cut the state, of two numbers a parameter. The update is computed twice, once for its
    norm and once to be applied, in bounded groups, so that it is never held whole.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig, context: OptimizerContext) -> None:
        defaults = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        self.param_groups = with_defaults(groups, defaults)
        self._context = context
        self._step_count = torch.zeros((), dtype=torch.float32, device=context.device)
        self._state = {
            id(master): (torch.zeros_like(master, requires_grad=False), torch.zeros_like(master, requires_grad=False))
            for group in self.param_groups
            for master in group["params"]
        }
        self._norms = [
            SquareNorms(group["params"], 2, context) if group["decayed"] else None for group in self.param_groups
        ]

    @torch.no_grad()
    def clipped_step(self, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        self._step_count.add_(1.0 if skip is None else (~skip).to(self._step_count.dtype))
        for group, norms in zip(self.param_groups, self._norms, strict=True):
            masters: Tensors = group["params"]
            firsts = [self._state[id(master)][0] for master in masters]
            seconds = [self._state[id(master)][1] for master in masters]
            gradients = gradients_of(masters, self._context)
            for raw, first, second in bounded_groups(gradients, firsts, seconds):
                _average(group["betas"], clipped(raw, clip), first, second, skip)
            ratios = None if norms is None else self._ratios(group, norms, firsts, seconds)
            self._apply(group, firsts, seconds, ratios, skip)

    def _ratios(self, group: dict[str, Any], norms: SquareNorms, firsts: Tensors, seconds: Tensors) -> torch.Tensor:
        """|p| / |u| of each master of the group: one vector."""
        of_updates = []
        for master, first, second in zip(group["params"], firsts, seconds, strict=True):
            parts = bounded_groups([master], [first], [second])
            squares = [local_squares(self._direction(group, *part))[0] for part in parts]
            of_updates.append(torch.stack(squares).sum() if squares else master.new_zeros(()))
        found = norms.of([local_squares(group["params"]), of_updates], "trust ratios")
        usable = (found[0] > 0) & (found[1] > 0)
        return torch.where(usable, (found[0] / torch.where(usable, found[1], 1.0)).sqrt(), 1.0)

    def _direction(self, group: dict[str, Any], masters: Tensors, firsts: Tensors, seconds: Tensors) -> Tensors:
        beta1, beta2 = group["betas"]
        count = self._step_count.to(torch.float64).clamp(min=1.0)
        dtype = masters[0].dtype
        denominators = list(torch._foreach_sqrt(seconds))
        torch._foreach_div_(denominators, (1.0 - beta2**count).sqrt().to(dtype))
        torch._foreach_add_(denominators, group["eps"])
        direction = list(torch._foreach_div(firsts, denominators))
        torch._foreach_div_(direction, (1.0 - beta1**count).to(dtype))
        if group["weight_decay"]:
            torch._foreach_add_(direction, masters, alpha=group["weight_decay"])
        return direction

    def _apply(
        self,
        group: dict[str, Any],
        firsts: Tensors,
        seconds: Tensors,
        ratios: torch.Tensor | None,
        skip: torch.Tensor | None,
    ) -> None:
        masters: Tensors = group["params"]
        each = masters if ratios is None else [ratio.expand_as(m) for ratio, m in zip(ratios, masters, strict=True)]
        for some, first, second, ratio in bounded_groups(masters, firsts, seconds, each):
            update = self._direction(group, some, first, second)
            if ratios is not None:
                torch._foreach_mul_(update, ratio)
            assign_unless(skip, some, torch._foreach_add(some, update, alpha=-group["lr"]))

    def state_tensors(self) -> Iterable[StateTensor]:
        yield StateTensor("lamb.step", None, self._step_count)
        for group in self.param_groups:
            for master in group["params"]:
                first, second = self._state[id(master)]
                yield StateTensor("lamb.exp_avg", master, first)
                yield StateTensor("lamb.exp_avg_sq", master, second)


def _average(
    betas: tuple[float, float], gradients: Tensors, firsts: Tensors, seconds: Tensors, skip: torch.Tensor | None
) -> None:
    """Both moments, as in AdamW."""
    assign_unless(skip, firsts, torch._foreach_lerp(firsts, gradients, 1.0 - betas[0]))
    fresh = list(torch._foreach_mul(seconds, betas[1]))
    torch._foreach_addcmul_(fresh, gradients, gradients, value=1.0 - betas[1])
    assign_unless(skip, seconds, fresh)


LAMB = OptimizerSpec(
    "lamb",
    Lamb,
    state_elements=lambda config: 2,
    keys=("lr", "betas", "eps", "weight_decay", "no_decay"),
    on_shards="aware",
)
