"""The one training step, with or without a pipeline, for every strategy. Read `StepEngine.train_step` from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from colossal_core import batch as batches
from colossal_core.gradients import clip_factor, local_square_norm, scale_gradients, sum_on_shards, sum_over_world
from colossal_core.loss import LossOwner, MicrobatchLoss
from colossal_core.mesh import LOSS_AXES
from colossal_core.modules import evaluation_mode
from colossal_core.plan import Plan
from colossal_core.strategy import ApplyContext, StepView

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.optimizers import ClippingOptimizer
    from colossal_core.precision import LossScale
    from colossal_core.runner import ProgramRunner


@dataclass(frozen=True)
class StepResult:
    """0-d tensors, the same on every rank; reading one waits for the device.

    loss: (sum of losses) / (items) of the global batch. grad_norm: L2 norm before clipping. num_tokens: items of the global batch, int64.
    skipped: whether the update was left out, because the loss or a gradient was not finite or there were no items.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    num_tokens: torch.Tensor
    skipped: torch.Tensor


@dataclass(frozen=True)
class EvalResult:
    """0-d tensors, the same on every rank. loss_sum / num_tokens is `loss`; loss_sum is in nats for a language model."""

    loss: torch.Tensor
    loss_sum: torch.Tensor
    num_tokens: torch.Tensor


class StepEngine:
    """Runs steps. model: the wrapped module; context: what the strategies filled; rates: learning rates of the groups by step."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        context: ApplyContext,
        optimizer: ClippingOptimizer,
        loss_owner: LossOwner,
        runner: ProgramRunner,
        loss_scale: LossScale | None,
        set_rates: Callable[[int], None],
    ) -> None:
        self.model = model
        self.plan = plan
        self.context = context
        self.optimizer = optimizer
        self.loss_owner = loss_owner
        self.runner = runner
        self.set_rates = set_rates
        self.state = context.parameter_state()
        self.step = 0
        self.loss_scale = loss_scale
        self._counts_loss = context.coordinate["tp"] == 0
        self._compared: set[str] = set()
        self._norm_dtype = context.precision.gradient
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=context.device)

    def train_step(self, batch: Mapping[str, torch.Tensor]) -> StepResult:
        """One optimizer step on this rank's share of a global batch.

        Communication: one all-reduce of 8 bytes over the loss axes before the first forward pass; the reductions of the plan; one
        all-reduce of a few bytes over all ranks for loss, items and norm. No synchronisation with the host, but for the first
        step's comparison of the batch where ranks must have the same one.
        """
        view = StepView(self.step, -1, self.state)
        batch = self._take(batch)
        divisor = self._total_items(batch)
        self.context.hooks.call("before_step", view)
        self.state.begin_step()
        losses = self.runner.run(self.step, batch, divisor)
        sum_on_shards(self.state, self.context.collectives)
        loss, items, norm = self._finish(losses, divisor)
        view = replace(view, grad_norm=norm, loss=loss, num_tokens=items)
        self.context.hooks.call("gradients_ready", view)
        finite = torch.isfinite(norm)
        skip = ~(finite & torch.isfinite(loss) & (items > 0))
        clip = self._clip(norm)
        self.set_rates(self.step)
        self.context.hooks.call("before_optimizer", view)
        self.optimizer.clipped_step(clip, skip)
        self.state.publish()
        if self.loss_scale is not None:
            self.loss_scale.update(~finite)
        self.skipped_steps += skip
        self.step += 1
        self.context.hooks.call("after_step", replace(view, step=self.step))
        return StepResult(loss, norm, items.to(torch.int64), skip)

    def _take(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batches.check_share(batch, self.plan.batch)
        self._compare_once(batch, "train")
        return self._on_device(batch)

    def _compare_once(self, batch: Mapping[str, torch.Tensor], use: str) -> None:
        """The first batch of each use: whether ranks that must have the same one have it. Later steps do not wait for the host."""
        if use not in self._compared:
            batches.check_same(batch, self.context.collectives)
            self._compared.add(use)

    def _on_device(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch on this rank's device, with the labels that each position predicts, and this rank's part of what the plan cuts."""
        moved = batches.to_device(batch, self.context.device, self._dtype_of)
        mesh = self.context.collectives.mesh
        return batches.take_part(
            self.loss_owner.with_targets(moved), self.plan.input_cuts, self.context.coordinate, mesh
        )

    def _dtype_of(self, key: str) -> torch.dtype:
        """Of a floating tensor in the batch: what is only compared with the outputs is not rounded to the compute dtype."""
        precision = self.context.precision
        return precision.compute if self.loss_owner.is_input(key) else precision.gradient

    def _total_items(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Items of the global batch, at least 1: what every microbatch's loss is divided by before backward."""
        items = self.loss_owner.count_items(batch)
        self.context.collectives.start_all_reduce(items, LOSS_AXES, use="reduce", tag="items").wait()
        return items.clamp(min=1.0)

    def _finish(
        self, losses: list[MicrobatchLoss], divisor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, items and gradient norm of the global batch; gradients are unscaled, and rescaled where the divisor was provisional.

        The norm is taken of the gradients as they lie in the shards and rescaled with them: one all-reduce serves all three numbers.
        Nothing but the norm reads the gradients where the divisor was exact and the loss not scaled.
        """
        square = local_square_norm(self.state, self.context.coordinate, self._norm_dtype, self.context.device)
        loss_sum, items, square = sum_over_world(
            [*self._local_sums(losses), square], self.context.collectives, torch.float64
        )
        counted, norm = items.clamp(min=1.0), square.sqrt()
        factor = None if self.loss_owner.exact_count else divisor / counted
        if self.loss_scale is not None:
            factor = (1.0 if factor is None else factor) / self.loss_scale.scale.double()
        if factor is not None:
            scale_gradients(self.state, factor)
            norm = norm * factor
        return loss_sum / counted, items, norm.to(self._norm_dtype)

    def _local_sums(self, losses: list[MicrobatchLoss]) -> list[torch.Tensor]:
        """Sum of losses and items of this rank's microbatches: 0-d float64. Zero where another rank of `tp` counts them."""
        device, dtype = self.context.device, torch.float64
        if not losses or not self._counts_loss:
            return [torch.zeros((), dtype=dtype, device=device)] * 2
        return [
            torch.stack([loss.sum.to(device) for loss in losses]).sum(dtype=dtype),
            torch.stack([loss.items.to(device) for loss in losses]).sum(dtype=dtype),
        ]

    def _clip(self, norm: torch.Tensor) -> torch.Tensor | None:
        max_norm = self.plan.config.optimizer.max_grad_norm
        return None if max_norm is None else clip_factor(norm, max_norm)

    def eval_step(self, batch: Mapping[str, torch.Tensor]) -> EvalResult:
        """Forward pass only, on this rank's share of an evaluation batch (any number of sequences), in evaluation mode."""
        batches.check_not_empty(batch)
        self._compare_once(batch, "evaluation")
        with evaluation_mode(self.model):
            parts = self.runner.evaluate(self._on_device(batch))
        loss_sum, items = sum_over_world(self._local_sums(parts), self.context.collectives, torch.float64)
        return EvalResult(loss_sum / items.clamp(min=1.0), loss_sum, items.to(torch.int64))
