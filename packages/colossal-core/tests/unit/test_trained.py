"""What a model keeps and what is asked of its parts when it is wrapped, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.anatomy import ModelAnatomy
from colossal_core.config import TrainConfig
from colossal_core.elementwise import ADAMW
from colossal_core.errors import ColossalError, ConfigError
from colossal_core.loss import LossOwner
from colossal_core.ops import build_op_table
from colossal_core.optimizers import optimizer_problems
from colossal_core.plugins import discover
from colossal_core.trained import Trained

Boosted = Callable[..., Trained]
BatchOf = Callable[[int], dict[str, torch.Tensor]]


class Counter:
    """A position, as a data loader has one."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]


def test_what_is_attached_after_loading_gets_its_state(boosted: Boosted, tmp_path: Path) -> None:
    trained, counter = boosted(), Counter()
    trained.attach("loader", counter)
    counter.position = 7
    trained.save(tmp_path)
    again, late = boosted(), Counter()
    again.load(tmp_path)
    again.attach("loader", late)
    assert late.position == 7


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.norm(self.first(x)))
        return found


def test_a_part_kept_in_evaluation_mode_stays_in_it(boosted: Boosted, batch_of: BatchOf) -> None:
    model = Normed()
    model.norm.eval()
    trained = boosted(model=model)
    trained.train_step(batch_of(0))
    trained.eval_step(batch_of(1))
    trained.train_step(batch_of(2))
    assert [module.training for module in model.children()] == [True, False, True]
    assert model.norm.running_mean is not None and torch.equal(model.norm.running_mean, torch.zeros(3))


class Tables(nn.Module):
    """Buffers that are not contiguous, and one that two modules share."""

    def __init__(self, full: torch.Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 2), nn.Linear(2, 1)
        self.table: torch.Tensor
        self.register_buffer("table", full)
        shared = torch.ones(1)
        self.first.register_buffer("scale", shared)
        self.second.register_buffer("scale", shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(x))
        return found


def test_a_transposed_buffer_returns_as_it_was(boosted: Boosted, tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4).t()
    boosted(model=Tables(table)).save(tmp_path)
    model = Tables(torch.zeros(4, 3))
    boosted(model=model).load(tmp_path)
    assert torch.equal(model.table, table)


def test_a_shared_buffer_stays_one_tensor(boosted: Boosted) -> None:
    model = Tables(torch.ones(2))
    boosted(config={"precision": "fp64"}, model=model)
    assert model.first.scale is model.second.scale


def test_an_empty_batch_is_refused(boosted: Boosted) -> None:
    trained = boosted()
    for step in (trained.train_step, trained.eval_step):
        with pytest.raises(ColossalError) as raised:
            step({})
        assert str(raised.value) == (
            "batch: is empty: a batch is a mapping of tensors, the forward's keyword arguments"
        )


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.phase).abs()


def test_a_complex_parameter_is_refused(boosted: Boosted) -> None:
    with pytest.raises(ConfigError) as raised:
        boosted(model=Complex())
    assert str(raised.value) == (
        "model: holds the parameter phase of dtype complex64, and training is in real numbers: "
        "hold it as real parameters (torch.view_as_real)"
    )


def test_a_language_model_without_labels_is_told_so() -> None:
    anatomy = ModelAnatomy("Model", "causal-lm", (), ())
    owner = LossOwner(anatomy, build_op_table(discover([]).ops(), "cpu", "float32"), None)
    with pytest.raises(ColossalError) as raised:
        owner.with_targets({"input_ids": torch.zeros(2, 3, dtype=torch.int64)})
    assert str(raised.value) == (
        "batch.labels: is missing, and the loss of a causal-lm model is made from it: "
        "add it (-100 where nothing is to be predicted), or pass loss_fn"
    )


def test_keys_that_nobody_reads_are_refused() -> None:
    config = TrainConfig.model_validate_json('{"batch": {"global_size": 1}, "optimizer": {"elementwise": true}}')
    problems = optimizer_problems(config, {"adamw": ADAMW})
    assert [str(problem) for problem in problems] == [
        "optimizer.elementwise: adamw does not read it: remove it; adamw reads lr, betas, eps, weight_decay, no_decay, states, masters"
    ]


def test_targets_keep_their_digits(boosted: Boosted) -> None:
    """1001 is 1000 in bfloat16."""
    trained = boosted(config={"precision": "bf16", "optimizer": {"lr": 1.0e-6}})
    batch = {"x": torch.zeros(4, 4), "y": torch.full((4, 1), 1001.0)}
    outputs = trained.module(x=batch["x"].bfloat16()).detach()
    assert float(trained.train_step(batch).loss) == float((outputs - batch["y"]).square().mean())
