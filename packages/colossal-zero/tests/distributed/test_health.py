"""What is not finite on one rank is everybody's business: skipping, the loss scale and the statistics of gradients are agreed on by all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from colossal_core.collectives import Collectives
from colossal_core.gradient_statistics import ALL_UNITS, units_not_finite
from colossal_core.testing import RunSpec, WorkerPool
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches, next_token_loss
from colossal_core.testing.parity import oracle_of, share_of_step, start
from colossal_core.trained import Trained

STAGES = [0, 1, 2, 3]
SICK_RANK, SICK_STEPS = 1, (1, 2)
SICK_PARAMETER = "blocks.1.up.weight"


def spec_of(stage: int, world_size: int = 2, **config: Any) -> RunSpec:
    given = {
        "batch": {"global_size": 2 * world_size, "micro_size": 1},
        "optimizer": {"lr": 0.01, "max_grad_norm": 0.1},
        "parallel": {"zero": {"stage": stage, "bucket_bytes": 9000}},
        **config,
    }
    return RunSpec(given, TinyModel(), TokenBatches(), task="causal-lm", num_steps=4)


@dataclass(frozen=True)
class Seen:
    """One rank's account of a run. skipped, scales: after each step. unchanged: for each step, whether every bit of the parameters and of
    the optimizer states was as before. not_finite: the units that the statistics name after each step.
    """

    skipped: tuple[bool, ...]
    losses: tuple[float, ...]
    scales: tuple[float, ...]
    unchanged: tuple[bool, ...]
    not_finite: tuple[tuple[str, ...], ...]
    skipped_steps: int


def bits(trained: Trained) -> list[torch.Tensor]:
    """Masters, compute copies where they are kept, and optimizer states."""
    trained._engine.state.wait_published()  # a gather on its way writes into the parameters
    shards = trained._engine.state.shards.values()
    kept: list[torch.Tensor] = [shard.master for shard in shards]
    if trained.plan.gathering.keep == "always":
        kept += [shard.parameter for shard in shards]
    registered = [tensor.local for tensor in trained._tensors() if not tensor.kind.startswith(("step.", "loss_scale."))]
    return [tensor.detach().clone() for tensor in (*kept, *registered)]


def observe(collectives: Collectives, spec: RunSpec) -> Seen:
    """Trains; in the sick steps the gradient of one parameter is infinite on one rank, in the first microbatch only."""
    trained = start(spec, collectives)
    calls = 0

    def planted(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        sick = trained.step in SICK_STEPS and calls % 2 == 1 and collectives.rank == SICK_RANK
        return gradient.index_fill(0, torch.tensor([0]), math.inf) if sick else gradient

    if spec.loss_fn is None:
        trained.module.get_parameter(SICK_PARAMETER).register_hook(planted)  # type: ignore[no-untyped-call]
    rows = []
    for step in range(spec.num_steps):
        before = bits(trained)
        result = trained.train_step(share_of_step(spec, trained.plan, collectives.rank, step))
        same = all(torch.equal(old, new) for old, new in zip(before, bits(trained), strict=True))
        scale = trained._engine.loss_scale
        found = units_not_finite(trained.gradient_statistics())
        rows.append(
            (bool(result.skipped), float(result.loss), 1.0 if scale is None else float(scale.scale), same, found)
        )
    skipped, losses, scales, unchanged, not_finite = zip(*rows, strict=True)
    return Seen(skipped, losses, scales, unchanged, not_finite, int(trained.skipped_steps))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_overflow_on_one_rank_is_skipped_by_all(pool: WorkerPool, stage: int, precision: str) -> None:
    """Parameters and states keep every bit, the scales stay equal, and the run goes on."""
    ranks = pool.run(2, observe, spec_of(stage, precision=precision))
    for seen in ranks:
        assert seen.skipped == (False, True, True, False)
        assert seen.unchanged == (False, True, True, False)
        assert seen.skipped_steps == 2
        assert seen.not_finite == ((), ("blocks.1",), ("blocks.1",), ())
        first = 65536.0 if precision == "fp16" else 1.0
        fall = 0.5 if precision == "fp16" else 1.0
        assert seen.scales == (first, first * fall, first * fall**2, first * fall**2)
    assert ranks[0] == ranks[1]


def sick_loss(outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """NaN for the batches whose first token is marked."""
    total, items = next_token_loss(outputs, batch)
    return total * batch["sick"].sum(), items


@dataclass(frozen=True)
class SickBatches:
    """In the sick steps one sequence, the last one of the global batch, has a loss that is not a number."""

    tokens: TokenBatches = field(default_factory=TokenBatches)

    def __call__(self, step: int, num_sequences: int) -> dict[str, torch.Tensor]:
        sick = torch.ones(num_sequences, 1)
        if step in SICK_STEPS:
            sick[-1] = math.nan
        return {**self.tokens(step, num_sequences), "sick": sick}


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_on_one_rank_that_is_not_a_number_is_skipped_by_all(pool: WorkerPool, stage: int) -> None:
    spec = replace(spec_of(stage, precision="fp32"), batch=SickBatches(), loss_fn=sick_loss)
    ranks = pool.run(2, observe, spec)
    for seen in ranks:
        assert seen.skipped == seen.unchanged == (False, True, True, False)
        assert [math.isfinite(loss) for loss in seen.losses] == [True, False, False, True]
        assert set(seen.not_finite[1]) == {"blocks.0", "blocks.1", "norm", "positions", "tokens"}
        assert seen.skipped_steps == 2
    assert [math.isnan(loss) for loss in ranks[0].losses] == [math.isnan(loss) for loss in ranks[1].losses]


Numbers = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Statistics:
    """After two steps. sent: for them, by operation in calls; norm: the step's own; zeros: their share of all whole gradients."""

    numbers: Numbers
    sent: list[tuple[str, int]]
    norm: float
    zeros: float


def statistics(collectives: Collectives, spec: RunSpec) -> Statistics:
    trained = start(spec, collectives)
    for step in range(2):
        result = trained.train_step(share_of_step(spec, trained.plan, collectives.rank, step))
    found = trained.gradient_statistics()
    numbers = {unit: {name: float(number) for name, number in vars(of).items()} for unit, of in found.items()}
    sent: list[tuple[str, int]] = []
    if collectives.mesh.world_size > 1:
        rows = trained.collectives.ledger.rows()  # type: ignore[attr-defined]
        sent = [(row.operation, row.num_calls) for row in rows if row.tag == "gradient statistics"]
    whole = torch.cat([gradient.flatten() for gradient in trained.gradients().values()])
    return Statistics(numbers, sent, float(result.grad_norm), float((whole == 0).double().mean()))


@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (1, 2), (1, 3), (2, 3), (3, 2)])
def test_statistics_are_those_of_one_process(pool: WorkerPool, stage: int, world_size: int) -> None:
    """Each element once, of shards of any size: unused (all zero), frozen, tied and shared parameters among them."""
    options = TinyOptions(unused=True, frozen=True, shared=True)
    spec = replace(spec_of(stage, world_size, precision="fp64"), model=TinyModel(options))
    alone = pool.run(1, statistics, oracle_of(spec))[0]
    truth = alone.numbers
    assert truth["spare"] == {"norm": 0.0, "max_abs": 0.0, "zero_fraction": 1.0, "non_finite": 0.0}
    assert 0.0 < truth[ALL_UNITS]["zero_fraction"] < 1.0
    for found in (alone, *pool.run(world_size, statistics, spec)):
        assert list(found.numbers) == list(truth)
        for unit, expected in truth.items():
            for name in ("norm", "max_abs", "non_finite"):
                assert math.isclose(found.numbers[unit][name], expected[name], rel_tol=1e-12), (unit, name)
        # The gradient of a key's bias is rounding, and 0 in one run where it is 1e-19 in another: zeros are those of the run itself.
        assert math.isclose(found.numbers[ALL_UNITS]["zero_fraction"], found.zeros, rel_tol=1e-12)
        assert found.numbers["spare"]["zero_fraction"] == 1.0
        assert math.isclose(found.numbers[ALL_UNITS]["norm"], found.norm, rel_tol=1e-12)
        assert sorted(found.sent) == ([("all_reduce", 2)] if found is not alone else [])


def save_after_an_overflow(collectives: Collectives, spec: RunSpec, directory: str) -> int:
    trained = start(spec, collectives)
    trained.module.get_parameter(SICK_PARAMETER).register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
    trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
    trained.save(directory)
    return int(trained.skipped_steps)


def load(collectives: Collectives, spec: RunSpec, directory: str) -> tuple[int, float]:
    trained = start(spec, collectives)
    trained.load(directory)
    scale = trained._engine.loss_scale
    assert scale is not None
    return int(trained.skipped_steps), float(scale.scale)


def test_the_count_is_found_again_on_another_mesh(pool: WorkerPool, tmp_path: Any) -> None:
    assert pool.run(2, save_after_an_overflow, spec_of(1, precision="fp16"), str(tmp_path)) == [1, 1]
    assert pool.run(3, load, spec_of(0, 3, precision="fp16"), str(tmp_path)) == [(1, 32768.0)] * 3
