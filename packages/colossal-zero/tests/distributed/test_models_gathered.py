"""Stage 3 on models whose blocks are awkward to gather: what they return, share, freeze or leave out. Against one process in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from colossal_core.testing import RunSpec, WorkerPool, compare, table
from colossal_core.testing.parity import oracle_of, prepare, share_of_step, start
from colossal_core.testing.probes import record

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

SIZE = 6


class Dense(nn.Module):
    """What the blocks below are made of: [B, SIZE] to [B, SIZE]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.up = nn.Linear(SIZE, 7)
        self.down = nn.Linear(7, SIZE)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return found

    def forward(self, x: torch.Tensor) -> Any:
        return self.mix(x)


class WithExtra(Dense):
    """Returns a tuple: its output, and a number of its own that only the loss reads."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.mix(x), self.up.weight.square().sum() * x.mean()


@dataclass
class Result:
    """A plain dataclass, as some models return it."""

    x: torch.Tensor
    note: str = ""


class WithDataclass(Dense):
    def forward(self, x: Any) -> Any:
        return Result(self.mix(x.x if isinstance(x, Result) else x))


class WithMapping(Dense):
    def forward(self, x: Any) -> Any:
        return {"x": self.mix(x["x"] if isinstance(x, Mapping) else x), "unused": None}


class PassingOn(Dense):
    """The first block makes a bias that all of them take and return, as T5's do."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.bias = nn.Linear(SIZE, SIZE) if first else None

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        if self.bias is not None:
            bias = torch.sin(self.bias(x))
        assert bias is not None
        return self.mix(x + bias), bias


class Detached(Dense):
    """Reads a weight for the input alone, before and after the use that gives it a gradient."""

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.tanh(x @ self.down.weight.detach() @ self.up.weight.detach())
        return x + self.down(torch.tanh(self.up(x))) + self.norm.weight + self.norm.bias


class Experts(Dense):
    """Each row block of the batch takes one expert, so that ranks and microbatches use different ones and leave others without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        choice = int(x.detach()[0].sum().mul(1000.0).round().long()) % 3
        return self.mix(x) + torch.tanh(self.experts[choice](x))


class Adapted(Dense):
    """A frozen base with a trained low-rank addition (Hu et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.inner = nn.Linear(SIZE, 2, bias=False)
        self.outer = nn.Linear(2, SIZE, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.mix(x) + self.outer(self.inner(x))


class Stack(nn.Module):
    """Blocks between two linear layers; `outer` ones that a batch may leave without gradient, in buckets of their own."""

    def __init__(
        self, make: Callable[[int], nn.Module], num_blocks: int, *, own_checkpoint: bool, routed: bool
    ) -> None:
        super().__init__()
        self.enter = nn.Linear(3, SIZE)
        self.blocks = nn.ModuleList(make(index) for index in range(num_blocks))
        self.routes = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(3 if routed else 0))
        self.leave = nn.Linear(SIZE, 1)
        self._own_checkpoint, self._reentrant = own_checkpoint, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice = int(x[0, 0].abs().mul(1000.0).round().long()) % 3
        hidden: Any = self.enter(x)
        extra: Any = torch.zeros((), dtype=x.dtype)
        bias: tuple[Any, ...] = ()
        for block in self.blocks:
            if self._own_checkpoint:
                hidden = checkpoint(block, hidden, *bias, use_reentrant=self._reentrant)
            else:
                hidden = block(hidden, *bias)
            if isinstance(block, PassingOn):
                hidden, *passed = hidden
                bias = tuple(passed)
            elif isinstance(hidden, tuple):
                hidden, added = hidden
                extra = extra + added
        hidden = hidden.x if isinstance(hidden, Result) else hidden
        hidden = hidden["x"] if isinstance(hidden, Mapping) else hidden
        if len(self.routes):
            hidden = hidden + self.routes[choice](hidden)
        found: torch.Tensor = self.leave(hidden) + 0.01 * extra
        return found


BLOCKS: Mapping[str, Callable[[int], nn.Module]] = {
    "a tuple with a term of the loss": lambda index: WithExtra(),
    "a dataclass": lambda index: WithDataclass(),
    "a mapping": lambda index: WithMapping(),
    "what another block made": lambda index: PassingOn(index == 0),
    "weights read without gradient": lambda index: Detached(),
    "experts": lambda index: Experts(),
    "adapters": lambda index: Adapted(),
}


@dataclass(frozen=True)
class Build:
    """Builds the model. twice: the list holds each block two times."""

    block: str = ""
    num_blocks: int = 3
    own_checkpoint: bool = False
    reentrant: bool = False
    routed: bool = False
    twice: bool = False

    def __call__(self) -> nn.Module:
        make = BLOCKS.get(self.block, lambda index: Dense())
        model = Stack(make, self.num_blocks, own_checkpoint=self.own_checkpoint, routed=self.routed)
        model._reentrant = self.reentrant
        if self.twice:
            model.blocks.extend(list(model.blocks))
        return model


def batch_of(step: int, num_sequences: int) -> Mapping[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(num_sequences, 3, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randn(num_sequences, 1, generator=generator, dtype=torch.float64)}


def squares(outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    return (outputs - batch["y"].to(outputs.dtype)).square().sum(), outputs.shape[0]


def spec_of(build: Build, zero: Mapping[str, Any], world_size: int = 2, **sections: Any) -> RunSpec:
    config = {
        "batch": {"global_size": 4 * world_size, "micro_size": 2},
        "precision": "fp64",
        "optimizer": {"lr": 0.001, "max_grad_norm": 0.1},
        "parallel": {"zero": dict(zero)},
    }
    return RunSpec({**config, **sections}, build, batch_of, loss_fn=squares)


def check(pool: WorkerPool, spec: RunSpec, world_size: int) -> None:
    oracle = pool.run(1, record, oracle_of(spec))[0]
    rows = compare(pool.run(world_size, record, spec), oracle)
    assert all(row.passed for row in rows), f"\n{table(rows)}"


@pytest.mark.parametrize("keep", ["use", "microbatch", "step"])
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_that_return_or_use_something_special(pool: WorkerPool, block: str, keep: str) -> None:
    check(pool, spec_of(Build(block), {"stage": 3, "keep_parameters": keep, "bucket_bytes": 256}), 2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_block_that_runs_twice(pool: WorkerPool, stage: int) -> None:
    check(pool, spec_of(Build(twice=True), {"stage": stage}), 2)


@pytest.mark.parametrize("block", ["", "what another block made", "experts"])
def test_checkpoints_that_the_user_set(pool: WorkerPool, block: str) -> None:
    for reentrant in (False, True):
        check(pool, spec_of(Build(block, own_checkpoint=True, reentrant=reentrant), {"stage": 3}), 2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_that_use_different_modules_outside_the_blocks(pool: WorkerPool, stage: int) -> None:
    """Each in a bucket of its own: reductions must still start in one order on every rank."""
    check(pool, spec_of(Build(routed=True), {"stage": stage, "bucket_bytes": 8}, 3), 3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_bucket_and_several_microbatches(pool: WorkerPool, stage: int) -> None:
    """Its next reduction starts while the last one may still be on its way."""
    check(pool, spec_of(Build(num_blocks=0), {"stage": stage}), 2)


@pytest.mark.parametrize("block", ["experts", "adapters"])
def test_shards_of_shards_are_copied(pool: WorkerPool, block: str) -> None:
    check(pool, spec_of(Build(block), {"stage": 3, "replicate": 2}, 4), 4)


def bytes_kept(collectives: Collectives, spec: RunSpec) -> tuple[int, int]:
    """Bytes of frozen and of trained masters on this rank, after a step."""
    trained = start(spec, collectives)
    trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
    shards = trained._engine.state.shards.values()
    kept = [sum(shard.master.nbytes for shard in shards if shard.layout.trainable is kind) for kind in (False, True)]
    return kept[0], kept[1]


def test_frozen_parameters_are_sharded_too(pool: WorkerPool) -> None:
    spec = spec_of(Build("adapters"), {"stage": 3})
    layouts = prepare(spec, 4).plan.layouts.values()
    whole = [8 * sum(layout.numel for layout in layouts if layout.trainable is kind) for kind in (False, True)]
    found = pool.run(4, bytes_kept, spec_of(Build("adapters"), {"stage": 3}, 4))
    assert [sum(column) for column in zip(*found, strict=True)] == whole
    assert max(found)[0] < whole[0] / 2
