"""Executing a program's actions. The plain runner knows one stage, the whole model; a pipeline brings one that knows more kinds of action.

The loop over actions is the same for both, and so is everything before and after it (`step.py`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch

from colossal_core import batch as batches
from colossal_core.loss import LossOwner, MicrobatchLoss
from colossal_core.mesh import DATA_AXES
from colossal_core.plan import Plan
from colossal_core.program import PLAIN_KINDS
from colossal_core.strategy import ApplyContext, StepView

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.precision import LossScale
    from colossal_core.program import Action


class RandomStreams(Protocol):
    """Sets every source of random numbers before a microbatch."""

    def seed(self, step: int, first_sample: int, sample_ids: torch.Tensor) -> None: ...


class ProgramRunner(Protocol):
    """Carries out one rank's actions of a step. kinds: the kinds of action that it knows; a program with another is a plan error."""

    @property
    def kinds(self) -> frozenset[str]: ...

    def run(self, step: int, batch: dict[str, torch.Tensor], divisor: torch.Tensor) -> list[MicrobatchLoss]:
        """Leaves the reduced gradients in the parameter state. batch: this rank's share. divisor: 0-d, items of the global batch. Returns
        the losses that this rank computed (none on a stage that is not the last), detached.
        """

    def evaluate(self, batch: dict[str, torch.Tensor]) -> list[MicrobatchLoss]:
        """Forward passes only."""


class PlainRunner:
    """The runner without a pipeline: `F0 B0 F1 B1 ... R`. Gradients are reduced inside the last backward pass."""

    kinds: frozenset[str] = frozenset(PLAIN_KINDS)

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        context: ApplyContext,
        loss_owner: LossOwner,
        random: RandomStreams,
        loss_scale: LossScale | None,
    ) -> None:
        self._model = model
        self._plan = plan
        self._context = context
        self._state = context.parameter_state()
        self._loss_owner = loss_owner
        self._random = random
        self._loss_scale = loss_scale
        self._actions: tuple[Action, ...] = plan.program.actions[context.coordinate["pp"]]
        self._last_backward = max(index for index, action in enumerate(self._actions) if action.kind == "backward")
        self._data_index = context.collectives.mesh.flat_index(context.coordinate, DATA_AXES)

    def run(self, step: int, batch: dict[str, torch.Tensor], divisor: torch.Tensor) -> list[MicrobatchLoss]:
        waiting: dict[int, MicrobatchLoss] = {}
        done: list[MicrobatchLoss] = []
        for index, action in enumerate(self._actions):
            if action.kind == "forward":
                waiting[action.microbatch] = self._forward(step, batch, action.microbatch)
            elif action.kind == "backward":
                loss = waiting.pop(action.microbatch)
                self._state.begin_backward(last=index == self._last_backward)
                self._backward(loss.sum, divisor)
                self._state.end_backward()
                done.append(MicrobatchLoss(loss.sum.detach(), loss.items))
            else:
                assert action.kind == "reduce", f"the plain runner has no action {action}"
                self._state.finish_reduce()
        return done

    def _forward(self, step: int, batch: dict[str, torch.Tensor], microbatch: int) -> MicrobatchLoss:
        plan = self._plan.batch
        self._context.hooks.call("before_microbatch", StepView(step, microbatch, self._state))
        first = batches.first_sample(plan, self._data_index, microbatch)
        ids = batches.sample_ids(plan, self._data_index, microbatch, self._context.device)
        self._random.seed(step, first, ids)
        with lifted(self._context):
            return self._loss_owner(self._model, batches.cut(batch, microbatch, plan.micro_size))

    def _backward(self, loss_sum: torch.Tensor, divisor: torch.Tensor) -> None:
        # In the gradient dtype: a number of items has no room in bfloat16, and the first loss scale, 65536, is infinite in float16.
        loss_sum = loss_sum.to(self._context.precision.gradient)
        if self._loss_scale is not None:
            loss_sum = loss_sum * self._loss_scale.scale
        scaled = loss_sum / divisor.to(loss_sum.dtype)
        with lifted(self._context):
            scaled.backward()  # type: ignore[no-untyped-call]

    def evaluate(self, batch: dict[str, torch.Tensor]) -> list[MicrobatchLoss]:
        size, micro = next(iter(batch.values())).shape[0], self._plan.batch.micro_size
        with torch.no_grad(), lifted(self._context):
            return [
                self._loss_owner(self._model, batches.cut(batch, index, micro)) for index in range(-(-size // micro))
            ]


def lifted(context: ApplyContext) -> AbstractContextManager[object]:
    """float64 throughout where the precision asks for it, else nothing."""
    if not context.precision.throughout:
        return nullcontext()
    from colossal_core.float64 import Float64Throughout

    return Float64Throughout()
