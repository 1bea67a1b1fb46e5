"""The interface that a pipeline will use, before there is one: blocks run part by part, and each action asks the state by name.

A small decoder is driven through core's `EagerBlockRunner` by a list of actions: forward passes of all microbatches, then the input parts
of the backward passes, then the weight parts, in an order as of a zero-bubble schedule. Compared with one plain backward pass in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from colossal_core.blocks import EagerBlockRunner
from colossal_core.testing import RunSpec, WorkerPool, relative_difference
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches, next_token_loss
from colossal_core.testing.parity import _build_model, prepare, share_of_step, start

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.trained import Trained

NUM_BLOCKS, MICRO = 3, 2
OPTIONS = TinyOptions(num_blocks=NUM_BLOCKS, tied=False, dropout=0.0)
Action = tuple[str, int]
"""(part, microbatch)."""

SCHEDULES: dict[str, tuple[Action, ...]] = {
    "whole": (("F", 0), ("B", 0), ("F", 1), ("B", 1), ("F", 2), ("B", 2)),
    "input parts first": (("F", 0), ("F", 1), ("F", 2), ("I", 0), ("I", 1), ("I", 2), ("W", 0), ("W", 1), ("W", 2)),
    "zero bubble": (("F", 0), ("F", 1), ("I", 0), ("F", 2), ("W", 0), ("I", 1), ("W", 1), ("I", 2), ("W", 2)),
}


def spec_of(stage: int, recompute: str, keep: str | None) -> RunSpec:
    zero = {"stage": stage, "bucket_bytes": 9000} | ({} if keep is None else {"keep_parameters": keep})
    config = {
        "batch": {"global_size": 6 * MICRO, "micro_size": MICRO},
        "precision": "fp64",
        "recompute": {"mode": recompute},
        "parallel": {"zero": zero},
    }
    return RunSpec(config, TinyModel(OPTIONS), TokenBatches(), loss_fn=next_token_loss)


@dataclass
class Stage:
    """One pipeline stage that holds the whole model: what runs its actions. Gathers around every use of a unit, and releases after it."""

    trained: Trained
    batches: Sequence[dict[str, torch.Tensor]]

    def __post_init__(self) -> None:
        model: Any = self.trained.module
        self.model = model
        self.state = self.trained._engine.state
        self.outside = [unit for unit in self.trained.plan.units if not unit.startswith("blocks.")]
        self.runners = [EagerBlockRunner(block) for block in model.blocks]
        self.entered: dict[int, torch.Tensor] = {}
        self.left: dict[int, torch.Tensor] = {}
        self.arrived: dict[int, torch.Tensor] = {}
        self.losses: dict[int, torch.Tensor] = {}

    def run(self, actions: Sequence[Action]) -> None:
        self.state.begin_step()
        last = max(index for index, (part, _) in enumerate(actions) if part in "BW")
        for index, (part, microbatch) in enumerate(actions):
            if part == "F":
                self.forward(microbatch)
            elif part == "I":
                self.backward(microbatch, split=True)
            else:
                self.state.begin_backward(last=index == last)
                if part == "B":
                    self.backward(microbatch, split=False)
                self.weights(microbatch, split=part == "W")
                self.state.end_backward()
        self.state.finish_reduce()

    def ends(self, asked: str) -> None:
        for unit in self.outside:
            getattr(self.state, asked)(unit)

    def forward(self, microbatch: int) -> None:
        ids = self.batches[microbatch]["input_ids"]
        self.ends("gather")
        position = torch.arange(ids.shape[1])
        x = self.model.tokens(ids) + self.model.positions(position)
        self.entered[microbatch] = x
        mask = (position[:, None] >= position[None, :]).expand(ids.shape[0], len(position), len(position))
        mask = mask & self.batches[microbatch]["attention_mask"][:, None, :].bool()
        for index, runner in enumerate(self.runners):
            self.state.gather(f"blocks.{index}")
            x = runner.forward(microbatch, (x.detach().requires_grad_(), mask), {})
            self.state.release(f"blocks.{index}")
        self.left[microbatch] = x.detach().requires_grad_()
        self.losses[microbatch] = self.loss(microbatch)
        self.ends("release")

    def loss(self, microbatch: int) -> torch.Tensor:
        from colossal_core.testing.models import Output

        logits = self.model.head(self.model.norm(self.left[microbatch]))
        return next_token_loss(Output(logits), self.batches[microbatch])[0]

    def backward(self, microbatch: int, *, split: bool) -> None:
        """The gradients of the inputs, from the loss to the embeddings. Those of the head come with it: it is not split."""
        self.ends("gather")
        (gradient,) = torch.autograd.grad(self.losses[microbatch], self.left[microbatch], retain_graph=True)
        self.ends("release")
        for index in reversed(range(NUM_BLOCKS)):
            self.state.gather(f"blocks.{index}")
            run = self.runners[index].backward_input if split else self.runners[index].backward
            found = run(microbatch, (gradient,))[0]
            assert found is not None
            gradient = found
            if not split:
                self.state.reduce(f"blocks.{index}")
            self.state.release(f"blocks.{index}")
        self.arrived[microbatch] = gradient

    def weights(self, microbatch: int, *, split: bool) -> None:
        if split:
            for index in reversed(range(NUM_BLOCKS)):
                self.state.gather(f"blocks.{index}")
                self.runners[index].backward_weight(microbatch)
                self.state.reduce(f"blocks.{index}")
                self.state.release(f"blocks.{index}")
        self.ends("gather")
        ends = [*self.model.norm.parameters(), *self.model.head.parameters()]
        torch.autograd.backward(self.losses.pop(microbatch), inputs=ends)
        torch.autograd.backward(self.entered.pop(microbatch), self.arrived.pop(microbatch))
        self.ends("reduce")
        self.ends("release")


def driven(collectives: Collectives, spec: RunSpec, schedule: str) -> list[dict[str, torch.Tensor]]:
    """The full gradients of two steps: the first before the order of reductions is agreed on, the second after it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(
        "colossal_core.wrap.install_gathering", lambda *arguments: None
    )  # the actions ask, not the hooks of a plain run
    try:
        trained = start(spec, collectives)
    finally:
        patch.undo()
    found = []
    for _ in range(2):
        share = share_of_step(spec, trained.plan, collectives.rank, 0)
        cuts = [{key: value[index * MICRO :][:MICRO] for key, value in share.items()} for index in range(3)]
        Stage(trained, cuts).run(SCHEDULES[schedule])
        found.append({name: gradient.clone() for name, gradient in trained.gradients().items()})
        trained._engine.state.publish()
    return found


def plain(spec: RunSpec) -> dict[str, torch.Tensor]:
    """The same gradients by one backward pass of the untouched model over the whole batch."""
    prepared = prepare(spec, 2)
    model = _build_model(spec, prepared.config)
    batch = TokenBatches()(0, prepared.plan.batch.global_size)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    torch.autograd.backward(next_token_loss(model(**inputs), batch)[0])
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


STAGES: dict[str, tuple[int, str | None]] = {"2": (2, None), "3-use": (3, "use"), "3-step": (3, "step")}
CASES = [(schedule, name, "none") for schedule in SCHEDULES for name in STAGES]
CASES += [("zero bubble", name, "full") for name in STAGES]


@pytest.mark.parametrize(("schedule", "stage", "recompute"), CASES, ids=["-".join(case) for case in CASES])
def test_parts_of_a_backward_pass_give_its_gradients(
    pool: WorkerPool, schedule: str, stage: str, recompute: str
) -> None:
    spec = spec_of(STAGES[stage][0], recompute, STAGES[stage][1])
    wanted = plain(spec)
    for rank in pool.run(2, driven, spec, schedule):
        for found in rank:
            assert found.keys() == wanted.keys()
            scale = float(torch.cat([gradient.flatten() for gradient in wanted.values()]).norm())
            for name, gradient in wanted.items():
                assert relative_difference(found[name], gradient, floor=1e-3 * scale) <= 1e-12, name
