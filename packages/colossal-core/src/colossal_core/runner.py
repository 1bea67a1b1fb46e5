"""Executing a program's actions: one loop, for a single stage that is the whole model and for the stages of a pipeline.

Everything before and after it (`step.py`) is the same for both. What crosses from rank to rank is the business of `stage_links.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from colossal_core import batch as batches
from colossal_core.loss import LossOwner, MicrobatchLoss
from colossal_core.mesh import DATA_AXES
from colossal_core.plan import Plan
from colossal_core.program import Action, forward_actions
from colossal_core.split_backward import Gradients
from colossal_core.stage_links import Signature, StageLinks, signature_of
from colossal_core.stages import StageEnd, StagePass
from colossal_core.strategy import ApplyContext, StepView

if TYPE_CHECKING:
    from colossal_core.precision import LossScale


class RandomStreams(Protocol):
    """Sets every source of random numbers before a microbatch."""

    def seed(self, step: int, first_sample: int, sample_ids: torch.Tensor) -> None: ...


@dataclass
class _Passage:
    """One microbatch's way through one stage, from its forward to its last backward action.

    received: what the stage before sent, leaves where it gets a gradient; empty on the first stage. roots: where its backward pass begins:
    on the last stage the loss, scaled, else the edges behind what crosses to the next one, of which no values are held. stage_pass: None
    without a pipeline. found: between the two parts of a backward pass, the gradients of parameters that came with the first.
    """

    received: tuple[Tensor, ...]
    roots: tuple[Any, ...]  # Tensor or GradientEdge: torch takes both, its types only one of them
    stage_pass: StagePass | None
    found: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.received if tensor.requires_grad]


@dataclass
class _Pass:
    """What the actions of one step, or of one evaluation, share. step, divisor: None in an evaluation; divisor: 0-d, items of the batch."""

    batch: dict[str, Tensor]
    actions: Sequence[Action]
    signatures: Sequence[Signature]
    losses: list[MicrobatchLoss]
    step: int | None = None
    divisor: Tensor | None = None


class ProgramRunner:
    """Carries out this rank's actions of the plan's program; in an evaluation the forward passes of its stages."""

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
        self._coordinate = context.coordinate["pp"]
        self._actions = plan.program.actions[self._coordinate]
        self._stages = plan.program.stages_of(self._coordinate)
        self._last_gradients = {
            action.stage: index
            for index, action in enumerate(self._actions)
            if action.kind in ("backward", "backward_weight")
        }
        self._split = {
            (action.stage, action.microbatch) for action in self._actions if action.kind == "backward_weight"
        }
        self._links = StageLinks(plan.program, context.collectives)
        self._data_index = context.collectives.mesh.flat_index(context.coordinate, DATA_AXES)
        self._open: dict[tuple[int, int], _Passage] = {}

    def run(self, step: int, batch: dict[str, Tensor], divisor: Tensor) -> list[MicrobatchLoss]:
        """Leaves the reduced gradients in the parameter state. batch: this rank's share. divisor: 0-d, items of the global batch. Returns
        the losses that this rank computed (none on a stage that is not the last), detached.
        """
        signatures = self._signatures(batch, self._plan.batch.num_microbatches)
        now = _Pass(batch, self._actions, signatures, [], step, divisor)
        self._abandon()
        self._carry_out(now)
        self._state.finish_reduce()
        if self._context.recorder is not None:
            self._context.recorder.end()
        return now.losses

    def _abandon(self) -> None:
        """What a step that an exception has ended has left under way."""
        for passage in self._open.values():
            if passage.stage_pass is not None:
                passage.stage_pass.abandon()
        self._open.clear()

    def evaluate(self, batch: dict[str, Tensor]) -> list[MicrobatchLoss]:
        """Forward passes only, of any number of sequences."""
        num_microbatches = -(-next(iter(batch.values())).shape[0] // self._plan.batch.micro_size)
        actions = forward_actions(self._plan.program, self._coordinate, num_microbatches)
        with torch.no_grad():
            now = _Pass(batch, actions, self._signatures(batch, num_microbatches), [])
            self._carry_out(now)
        if self._is_pipeline:  # without one, hooks have released what they had gathered
            for unit in self._plan.units:
                self._state.release(unit)
        return now.losses

    def _carry_out(self, now: _Pass) -> None:
        recorder = self._context.recorder
        self._links.begin(now.actions, now.signatures, None if recorder is None else recorder.arrived)
        for index, action in enumerate(now.actions):
            self._links.post_ahead(index)
            if recorder is not None:
                recorder.begin(action)
            self._act(now, index, action)
            if recorder is not None:
                recorder.end()
        self._links.finish()

    def _act(self, now: _Pass, index: int, action: Action) -> None:
        if action.kind == "forward":
            self._forward(now, action)
        elif action.kind == "backward":
            self._begin_backward(index, action)
            self._backward(action)
            self._state.end_backward()
        elif action.kind == "backward_input":
            self._backward_input(action)
        elif action.kind == "backward_weight":
            self._begin_backward(index, action)
            self._backward_weight(action)
            self._state.end_backward()
        elif action.kind == "send":
            self._links.send(action)
        elif action.kind == "receive":
            self._links.receive(index)
        else:
            assert action.kind == "reduce", f"the runner has no action {action}"

    @property
    def _is_pipeline(self) -> bool:
        return self._plan.program.num_stages > 1

    def _signatures(self, batch: dict[str, Tensor], num_microbatches: int) -> list[Signature]:
        """What the shapes of each microbatch's activations depend on, the same on every stage."""
        if not self._is_pipeline:
            return []
        micro = self._plan.batch.micro_size
        return [signature_of(batches.cut(batch, index, micro)) for index in range(num_microbatches)]

    def _forward(self, now: _Pass, action: Action) -> None:
        stage, microbatch, plan = action.stage, action.microbatch, self._plan.batch
        if now.step is not None:
            if stage == self._stages[0]:
                self._context.hooks.call("before_microbatch", StepView(now.step, microbatch, self._state))
            first = batches.first_sample(plan, self._data_index, microbatch)
            ids = batches.sample_ids(plan, self._data_index, microbatch, self._context.device)
            self._random.seed(now.step, first, ids)
        received = self._links.take("activations", action) if stage > 0 else ()
        with lifted(self._context), self._running(now, action, received) as stage_pass:
            try:
                loss = self._loss_owner(self._model, batches.cut(now.batch, microbatch, plan.micro_size))
            except StageEnd as end:
                outputs = end.outputs
            else:
                now.losses.append(MicrobatchLoss(loss.sum.detach(), loss.items))
                outputs = () if now.divisor is None else (self._scaled(loss.sum, now.divisor),)
        roots: tuple[Any, ...] = outputs
        if stage + 1 < self._plan.program.num_stages:
            self._links.give("activations", action, stage + 1, outputs)
            roots = tuple(get_gradient_edge(output) for output in outputs if output.requires_grad)
        if now.step is not None:
            self._open[stage, microbatch] = _Passage(received, roots, stage_pass)

    def _running(
        self, now: _Pass, action: Action, received: Sequence[Tensor]
    ) -> AbstractContextManager[StagePass | None]:
        stages = self._context.stages
        if stages is None:
            assert not self._is_pipeline, "the program has stages, and no strategy has cut the model"
            return nullcontext()
        split = now.step is not None and (action.stage, action.microbatch) in self._split
        return stages.running(action.stage, received, split=split)

    def _scaled(self, loss_sum: Tensor, divisor: Tensor) -> Tensor:
        # In the gradient dtype: a number of items has no room in bfloat16, and the first loss scale, 65536, is infinite in float16.
        loss_sum = loss_sum.to(self._context.precision.gradient)
        if self._loss_scale is not None:
            loss_sum = loss_sum * self._loss_scale.scale
        return loss_sum / divisor.to(loss_sum.dtype)

    # --- backward

    def _begin_backward(self, index: int, action: Action) -> None:
        self._state.begin_backward(last=index == self._last_gradients[action.stage], units=self._units(action.stage))

    def _units(self, stage: int) -> tuple[str, ...] | None:
        return self._plan.stage_units[stage] if self._is_pipeline else None

    def _gradients(self, action: Action) -> Gradients:
        """Those of the roots of a stage's backward pass: of the loss it is one, of what crossed to the next stage they have come back."""
        if action.stage + 1 == self._plan.program.num_stages:
            return (None,)
        return self._links.take("gradients", action)

    def _backward(self, action: Action) -> None:
        passage = self._open.pop((action.stage, action.microbatch))
        gradients = self._gradients(action)
        if passage.roots:
            with lifted(self._context):
                torch.autograd.backward(passage.roots, gradients)
        self._give_back(action, passage, [leaf.grad for leaf in passage.leaves])

    def _backward_input(self, action: Action) -> None:
        """Gradients for the stage before. What units leave for later is in the stage's pass; other parameters get theirs with it."""
        passage = self._open[action.stage, action.microbatch]
        assert passage.stage_pass is not None, f"{action} without stages"
        gradients = self._gradients(action)
        parameters = self._trained(action.stage)
        leaves, anchors = passage.leaves, passage.stage_pass.anchors
        targets = [*leaves, *anchors, *parameters]
        found: Gradients = (None,) * len(targets)
        if passage.roots:
            with lifted(self._context):
                found = torch.autograd.grad(passage.roots, targets, gradients, allow_unused=True)
        arrived = zip(parameters, found[len(leaves) + len(anchors) :], strict=True)
        passage.found = [(one, gradient) for one, gradient in arrived if gradient is not None]
        self._give_back(action, passage, found[: len(leaves)])
        passage.roots, passage.received = (), ()

    def _backward_weight(self, action: Action) -> None:
        passage = self._open.pop((action.stage, action.microbatch))
        assert passage.stage_pass is not None, f"{action} without stages"
        with lifted(self._context):
            sums: dict[nn.Parameter, Tensor] = {}
            for parameter, gradient in (*passage.found, *passage.stage_pass.parameter_gradients()):
                sums[parameter] = sums[parameter] + gradient if parameter in sums else gradient
            if sums:  # into the leaves by autograd's own way, so that whoever waits for gradients there is told, once
                torch.autograd.backward(list(sums), list(sums.values()))

    def _give_back(self, action: Action, passage: _Passage, found: Sequence[Tensor | None]) -> None:
        """Gradients of what was received, for the stage before. One that nothing depends on is zero: the other side waits for it."""
        if action.stage > 0:
            pairs = zip(passage.leaves, found, strict=True)
            whole = [torch.zeros_like(leaf) if one is None else one for leaf, one in pairs]
            self._links.give("gradients", action, action.stage - 1, whole)

    def _trained(self, stage: int) -> list[nn.Parameter]:
        units = self._units(stage)
        trained = (shard for shard in self._state.shards.values() if shard.layout.trainable)
        return [shard.parameter for shard in trained if units is None or shard.layout.block in units]


def lifted(context: ApplyContext) -> AbstractContextManager[object]:
    """float64 throughout where the precision asks for it, else nothing."""
    if not context.precision.throughout:
        return nullcontext()
    from colossal_core.float64 import Float64Throughout

    return Float64Throughout()
