"""Models as users hand them over: drawn without a seed, with sparse gradients, or recomputing parts by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from colossal_core.config import parse_config
from colossal_core.errors import ColossalError
from colossal_core.examine import examine
from colossal_core.ops import build_op_table
from colossal_core.plan import make_plan
from colossal_core.plugins import discover
from colossal_core.testing import WorkerPool
from colossal_core.wrap import Parts, wrap

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.trained import Trained


class Lookup(nn.Module):
    """A table with gradients of its rows alone, a buffer of random numbers, and a layer that runs three times."""

    def __init__(self, *, reentrant: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, sparse=True)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)
        self.noise: torch.Tensor
        self.register_buffer("noise", torch.randn(4).to(torch.bfloat16))
        self._reentrant = reentrant

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        x = self.table(index) + self.noise.to(self.table.weight.dtype)
        for _ in range(3):
            x = checkpoint(self._again, x, use_reentrant=self._reentrant)
        found: torch.Tensor = self.head(x)
        return found

    def _again(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x))


def squares(outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    return (outputs.float() - batch["y"].float()).square().sum(), outputs.shape[0]


def start(collectives: Collectives, model: nn.Module, stage: int, precision: str) -> Trained:
    plugins = discover(allow="zero")
    section = {"zero": {"stage": stage, "bucket_bytes": 8}}
    data: dict[str, Any] = {"batch": {"global_size": 8}, "precision": precision, "parallel": section}
    config = parse_config(data, plugins.config_class())
    anatomy, ops = examine(model), build_op_table(plugins.ops(), "cpu", "float32")
    strategies = plugins.active(config)
    size = collectives.mesh.world_size
    plan = make_plan(config, anatomy, strategies, plugins.axis_sizes(config), ops, world_size=size)
    seen = collectives.with_mesh(plan.mesh)
    return wrap(model, plan, anatomy, strategies, seen, ops, plugins.optimizers(), Parts(loss_fn=squares))


def share(collectives: Collectives) -> dict[str, torch.Tensor]:
    count = 8 // collectives.mesh.world_size
    whole = {"index": torch.arange(8) % 7, "y": torch.linspace(-1, 1, 8)[:, None]}
    return {key: value[collectives.rank * count :][:count] for key, value in whole.items()}


def train_unseeded(collectives: Collectives, stage: int) -> list[dict[str, torch.Tensor]]:
    """Every tensor of the module, when it is wrapped and after two steps. Each rank draws numbers of its own."""
    torch.manual_seed(collectives.rank)
    trained = start(collectives, Lookup(), stage, "fp32")
    seen = [{name: value.clone() for name, value in trained.module.state_dict().items()}]
    for _ in range(2):
        trained.train_step(share(collectives))
    return [*seen, {name: value.clone() for name, value in trained.module.state_dict().items()}]


@pytest.mark.parametrize("stage", [0, 1])
def test_every_rank_starts_from_the_first_ones_numbers(pool: WorkerPool, stage: int) -> None:
    first, second = pool.run(2, train_unseeded, stage)
    torch.manual_seed(0)
    torch.testing.assert_close(first[0], dict(Lookup().state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def sparse_gradient(collectives: Collectives, precision: str) -> torch.Tensor:
    torch.manual_seed(0)
    trained = start(collectives, Lookup(), 1, precision)
    trained.train_step(share(collectives))
    return trained.gradients()["table.weight"].float()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sparse_gradients_are_summed(pool: WorkerPool, precision: str) -> None:
    alone = pool.run(1, sparse_gradient, precision)[0]
    together = pool.run(2, sparse_gradient, precision)[0]
    assert alone.norm() > 0
    torch.testing.assert_close(together, alone)


def reentrant_step(collectives: Collectives) -> str:
    torch.manual_seed(0)
    trained = start(collectives, Lookup(reentrant=True), 0, "fp32")
    try:
        trained.train_step(share(collectives))
    except ColossalError as error:
        return str(error)
    return ""


def test_a_gradient_that_comes_after_its_reduction_is_an_error(pool: WorkerPool) -> None:
    expected = (
        "the gradient of inner.bias came twice in one backward pass: a part of the model that runs several times is "
        "recomputed by torch.utils.checkpoint with use_reentrant=True, which adds to it each time: set use_reentrant=False"
    )
    assert pool.run(2, reentrant_step) == [expected, expected]
