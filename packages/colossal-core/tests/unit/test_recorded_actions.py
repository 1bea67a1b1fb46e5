"""A recorder of actions is told of each, in order, where a step has one; and of none in any other."""

from __future__ import annotations

import torch

from colossal_core.collectives import SingleProcess
from colossal_core.program import Action
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TinyModel, TokenBatches
from colossal_core.testing.parity import share_of_step, start


class Told:
    """What it was told, as text."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def begin(self, action: Action) -> None:
        self.words.append(f"{action} begins")

    def arrived(self) -> None:
        self.words.append("arrived")

    def end(self) -> None:
        self.words.append("end")


def test_a_recorder_is_told_of_every_action() -> None:
    config = {"batch": {"global_size": 4, "micro_size": 2}, "precision": "fp32"}
    spec = RunSpec(config, TinyModel(), TokenBatches(), task="causal-lm", plugins="")
    trained = start(spec, SingleProcess(torch.device("cpu")))
    shares = [share_of_step(spec, trained.plan, 0, step) for step in range(3)]
    told, context = Told(), trained._engine.context
    trained.train_step(shares[0])
    context.recorder = told
    trained.train_step(shares[1])
    context.recorder = None
    trained.train_step(shares[2])
    actions = [word for number in range(2) for word in (f"F0.{number} begins", "end", f"B0.{number} begins", "end")]
    assert told.words == [*actions, "R0 begins", "end", "end"]
