"""A user's own optimizer and scheduler: saving changes nothing, resuming goes on as if nothing had happened, and nothing is ignored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from colossal_core.errors import CheckpointError, ConfigError
from colossal_core.trained import Trained

Boosted = Callable[..., Trained]
BatchOf = Callable[[int], dict[str, torch.Tensor]]


class Averaged(torch.optim.Optimizer):
    """Momentum, divided by a step count that is a plain number, as many optimizers outside torch keep it."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"], state["momentum"] = 0, torch.zeros_like(parameter)
                state["step"] += 1
                state["momentum"].mul_(0.9).add_(parameter.grad)
                parameter.sub_(group["lr"] / state["step"] * state["momentum"])


class Hoarding(Averaged):
    """Keeps something that no checkpoint can hold."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        for state in self.state.values():
            state["seen"] = {1, 2}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "a number for a step": Averaged,
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "Adam with a rate in a tensor": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.01)),
    "NAdam, whose products begin at 1": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "Rprop, whose step sizes begin at lr": lambda parameters: torch.optim.Rprop(parameters, lr=0.01),
    "ASGD, whose eta begins at lr": lambda parameters: torch.optim.ASGD(parameters, lr=0.01),
    "SGD with dampening": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5),
    "SGD without state": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "milestones": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [3], 0.01),
    "one after another": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.MultiStepLR(optimizer, [1], 0.01)], [3]
    ),
    "a function": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1)),
}


def train(trained: Trained, batch_of: BatchOf, first: int, stop: int) -> dict[str, torch.Tensor]:
    for step in range(first, stop):
        trained.train_step(batch_of(step))
    return {name: trained.full_parameter(name) for name in trained.plan.layouts}


@pytest.mark.parametrize("num_before", [0, 2])
@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_saving_and_resuming_change_nothing(
    boosted: Boosted, batch_of: BatchOf, tmp_path: Path, build: Any, num_before: int
) -> None:
    expected = train(boosted(build), batch_of, 0, 5)
    saved, resumed = boosted(build), boosted(build)
    train(saved, batch_of, 0, num_before)
    saved.save(tmp_path)
    train(resumed, batch_of, 7, 9)  # what it has of its own is given up
    resumed.load(tmp_path)
    torch.testing.assert_close(train(saved, batch_of, num_before, 5), expected, rtol=0, atol=0)
    torch.testing.assert_close(train(resumed, batch_of, num_before, 5), expected, rtol=0, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.filterwarnings(
    "ignore:The epoch parameter in `scheduler.step:UserWarning"
)  # SequentialLR calls it so itself
def test_a_schedule_goes_on(boosted: Boosted, batch_of: BatchOf, tmp_path: Path, schedule: Any) -> None:
    build = OPTIMIZERS["Adam"]
    expected = train(boosted(build, schedule), batch_of, 0, 6)
    saved, resumed = boosted(build, schedule), boosted(build, schedule)
    train(saved, batch_of, 0, 2)
    saved.save(tmp_path)
    resumed.load(tmp_path)
    torch.testing.assert_close(train(resumed, batch_of, 2, 6), expected, rtol=0, atol=0)


def test_a_state_that_cannot_be_saved_says_so(boosted: Boosted, batch_of: BatchOf, tmp_path: Path) -> None:
    trained = boosted(Hoarding)
    trained.train_step(batch_of(0))
    with pytest.raises(CheckpointError) as raised:
        trained.save(tmp_path)
    assert str(raised.value) == (
        "checkpoint: the optimizer keeps seen of first.weight as set, and only tensors, numbers, texts and lists of them can be saved"
    )


def refusal(boosted: Boosted, *given: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        boosted(*given)
    return str(raised.value)


def test_what_would_be_ignored_is_refused(boosted: Boosted) -> None:
    adam = OPTIMIZERS["Adam"]
    assert refusal(boosted, adam, None, {"scheduler": {"name": "linear"}}) == (
        "scheduler: is set beside an optimizer that was handed to boost, whose rates are its own: "
        "hand over lr_scheduler, and remove it here"
    )
    assert refusal(
        boosted, adam, lambda optimizer: lr_scheduler.ConstantLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
    ) == (
        "lr_scheduler: schedules another optimizer than the instance handed to boost: "
        "hand over the optimizer that it was built on"
    )


def test_what_cannot_be_driven_is_refused(boosted: Boosted) -> None:
    assert refusal(boosted, OPTIMIZERS["Adam"], lr_scheduler.ReduceLROnPlateau) == (
        "lr_scheduler: ReduceLROnPlateau needs a metric at each step, which core does not have: leave it out, "
        "call its step(metric) after an evaluation, and save it by trained.attach('plateau', scheduler)"
    )
    assert refusal(boosted, torch.optim.LBFGS) == (
        "optimizer: LBFGS.step needs a closure that runs the model, and core runs it: "
        "use an optimizer whose step needs none"
    )
