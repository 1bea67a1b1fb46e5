"""The one training step, with or without a pipeline, for every strategy. Read `StepEngine.train_step` from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from colossal_core import batch as batches
from colossal_core.gradients import clip_factor, local_square_norm, scale_gradients, sum_on_shards, sum_over_world
from colossal_core.loss import LossOwner, MicrobatchLoss
from colossal_core.plan import DATA_AXES, Plan
from colossal_core.precision import LossScale
from colossal_core.strategy import ApplyContext, StepView

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.optimizers import ClippingOptimizer


@dataclass(frozen=True)
class StepResult:
    """0-d tensors, the same on every rank; reading one waits for the device.

    loss: (sum of losses) / (items) of the global batch. grad_norm: L2 norm before clipping. num_tokens: items of the global batch, int64.
    skipped: whether the update was left out, because a gradient was not finite or there were no items.
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


class RandomStreams(Protocol):
    """Sets every source of random numbers before a microbatch."""

    def seed(self, step: int, microbatch: int, sample_ids: torch.Tensor) -> None: ...


class StepEngine:
    """Runs steps. model: the wrapped module; context: what the strategies filled; rates: learning rates of the groups by step."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        context: ApplyContext,
        optimizer: ClippingOptimizer,
        loss_owner: LossOwner,
        random: RandomStreams,
        set_rates: Callable[[int], None],
    ) -> None:
        self.model = model
        self.plan = plan
        self.context = context
        self.optimizer = optimizer
        self.loss_owner = loss_owner
        self.random = random
        self.set_rates = set_rates
        self.state = context.parameter_state()
        self.step = 0
        self.loss_scale = LossScale(context.device) if context.precision.scaled else None
        self._mesh = context.collectives.mesh
        self._counts_loss = all(context.coordinate[axis] == 0 for axis in ("cp", "tp"))
        self._data_index = self._mesh.flat_index(context.coordinate, DATA_AXES)
        self._norm_dtype = context.precision.master

    def train_step(self, batch: Mapping[str, torch.Tensor]) -> StepResult:
        """One optimizer step on this rank's share of a global batch.

        Communication: one all-reduce of 8 bytes over the data axes before the first forward pass; the reductions of the plan; one
        all-reduce of a few bytes over all ranks for loss, items and norm. No synchronisation with the host.
        """
        view = StepView(self.step, -1, self.state)
        batch = self._take(batch)
        divisor = self._total_items(batch)
        self.context.hooks.call("before_step", view)
        self.state.begin_step()
        losses = self._run_program(batch, divisor)
        sum_on_shards(self.state, self.context.collectives)
        loss, items, norm = self._finish(losses, divisor)
        view = replace(view, grad_norm=norm, loss=loss, num_tokens=items)
        self.context.hooks.call("gradients_ready", view)
        skip = ~torch.isfinite(norm) | (items == 0)
        clip = self._clip(norm)
        self.set_rates(self.step)
        self._hand_over_gradients()
        self.context.hooks.call("before_optimizer", view)
        self.optimizer.clipped_step(clip, skip)
        self.state.publish()
        if self.loss_scale is not None:
            self.loss_scale.update(~torch.isfinite(norm))
        self.step += 1
        self.context.hooks.call("after_step", replace(view, step=self.step))
        return StepResult(loss, norm, items.to(torch.int64), skip)

    def _take(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batches.check_share(batch, self.plan.batch)
        return batches.to_device(batch, self.context.device, self.context.precision.compute)

    def _total_items(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Items of the global batch, at least 1: what every microbatch's loss is divided by before backward."""
        items = self.loss_owner.count_items(batch)
        self.context.collectives.start_all_reduce(items, DATA_AXES, use="reduce", tag="items").wait()
        return items.clamp(min=1.0)

    def _run_program(self, batch: dict[str, torch.Tensor], divisor: torch.Tensor) -> list[MicrobatchLoss]:
        """Executes this rank's actions. Gradients accumulate in the state; they are reduced when the last backward has run."""
        actions = self.plan.program.actions[self.context.coordinate["pp"]]
        last_backward = max(index for index, action in enumerate(actions) if action.kind == "backward")
        waiting: dict[int, MicrobatchLoss] = {}
        done: list[MicrobatchLoss] = []
        for index, action in enumerate(actions):
            if action.kind == "forward":
                waiting[action.microbatch] = self._forward(batch, action.microbatch)
            elif action.kind == "backward":
                loss = waiting.pop(action.microbatch)
                self.state.begin_backward(last=index == last_backward)
                self._backward(loss.sum, divisor)
                done.append(MicrobatchLoss(loss.sum.detach(), loss.items))
            else:
                assert action.kind == "reduce", f"the plain runner has no action {action}"
                self.state.finish_reduce()
        return done

    def _forward(self, batch: dict[str, torch.Tensor], microbatch: int) -> MicrobatchLoss:
        plan = self.plan.batch
        self.context.hooks.call("before_microbatch", StepView(self.step, microbatch, self.state))
        samples = batches.sample_ids(plan, self._data_index, microbatch, self.context.device)
        self.random.seed(self.step, microbatch, samples)
        with lifted(self.context):
            return self.loss_owner(self.model, batches.cut(batch, microbatch, plan.micro_size))

    def _backward(self, loss_sum: torch.Tensor, divisor: torch.Tensor) -> None:
        scaled = loss_sum / divisor.to(loss_sum.dtype)
        if self.loss_scale is not None:
            scaled = scaled * self.loss_scale.scale.to(scaled.dtype)
        with lifted(self.context):
            scaled.backward()  # type: ignore[no-untyped-call]

    def _finish(self, losses: list[MicrobatchLoss], divisor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, items and gradient norm of the global batch; gradients are unscaled, and rescaled where the divisor was provisional.

        The norm is taken of the gradients as they lie in the shards and rescaled with them: one all-reduce serves all three numbers.
        """
        device, dtype = self.context.device, torch.float64
        counted = 1.0 if self._counts_loss else 0.0
        loss_sum = torch.stack([loss.sum.to(device, dtype) for loss in losses]).sum() * counted
        items = torch.stack([loss.items.to(device, dtype) for loss in losses]).sum() * counted
        square = local_square_norm(self.state, self.context.coordinate, self._norm_dtype)
        loss_sum, items, square = sum_over_world([loss_sum, items, square], self.context.collectives, dtype)
        factor = torch.ones((), dtype=dtype, device=device)
        if not self.loss_owner.exact_count:
            factor = divisor / items.clamp(min=1.0)
        if self.loss_scale is not None:
            factor = factor / self.loss_scale.scale
        if self.loss_scale is not None or not self.loss_owner.exact_count:
            scale_gradients(self.state, factor)
        return loss_sum / items.clamp(min=1.0), items, (square.sqrt() * factor).to(self._norm_dtype)

    def _clip(self, norm: torch.Tensor) -> torch.Tensor | None:
        max_norm = self.plan.config.optimizer.max_grad_norm
        return None if max_norm is None else clip_factor(norm, max_norm)

    def _hand_over_gradients(self) -> None:
        for shard in self.state.shards.values():
            if shard.layout.trainable:
                shard.master.grad = shard.gradient

    def eval_step(self, batch: Mapping[str, torch.Tensor]) -> EvalResult:
        """Forward pass only, on this rank's share of an evaluation batch (any number of sequences), in evaluation mode."""
        batch = batches.to_device(batch, self.context.device, self.context.precision.compute)
        size = next(iter(batch.values())).shape[0]
        micro = self.plan.batch.micro_size
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), lifted(self.context):
                parts = [self.loss_owner(self.model, batches.cut(batch, index, micro)) for index in range(-(-size // micro))]
        finally:
            self.model.train(training)
        counted = 1.0 if self._counts_loss else 0.0
        sums = [torch.stack([part.sum.to(torch.float64) for part in parts]).sum() * counted]
        sums.append(torch.stack([part.items for part in parts]).sum() * counted)
        loss_sum, items = sum_over_world(sums, self.context.collectives, torch.float64)
        return EvalResult(loss_sum / items.clamp(min=1.0), loss_sum, items.to(torch.int64))


def lifted(context: ApplyContext) -> AbstractContextManager[object]:
    """float64 throughout where the precision asks for it, else nothing."""
    if not context.precision.throughout:
        return nullcontext()
    from colossal_core.float64 import Float64Throughout

    return Float64Throughout()
