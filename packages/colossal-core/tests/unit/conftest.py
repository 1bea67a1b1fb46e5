"""A regression of one process in training: what the tests of a user's own parts are made on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.collectives import SingleProcess
from colossal_core.config import parse_config
from colossal_core.examine import examine
from colossal_core.ops import build_op_table
from colossal_core.plan import make_plan
from colossal_core.plugins import discover
from colossal_core.trained import Trained
from colossal_core.wrap import Parts, wrap

OptimizerBuilder = Callable[[Any], torch.optim.Optimizer]
SchedulerBuilder = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(x).tanh())
        return found


def squares(outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    return (outputs - batch["y"]).square().sum(), outputs.shape[0]


def make_trained(
    optimizer: OptimizerBuilder | None = None,
    scheduler: SchedulerBuilder | None = None,
    config: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
) -> Trained:
    """The model (the same numbers each time) with an optimizer and a scheduler of the user's own, in training on the CPU."""
    torch.manual_seed(0)
    module = Regression() if model is None else model
    made = None if optimizer is None else optimizer(module.parameters())
    parts = Parts(made, None if scheduler is None or made is None else scheduler(made), squares)
    plugins = discover([])
    read = parse_config({"batch": {"global_size": 4}, **(config or {})}, plugins.config_class())
    anatomy, ops = examine(module), build_op_table(plugins.ops(), "cpu", "float32")
    plan = make_plan(read, anatomy, (), {}, ops, world_size=1)
    return wrap(module, plan, anatomy, (), SingleProcess(torch.device("cpu")), ops, plugins.optimizers(), parts)


def make_batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(4, 4, generator=generator), "y": torch.randn(4, 1, generator=generator)}


@pytest.fixture
def boosted() -> Callable[..., Trained]:
    return make_trained


@pytest.fixture
def batch_of() -> Callable[[int], dict[str, torch.Tensor]]:
    return make_batch
