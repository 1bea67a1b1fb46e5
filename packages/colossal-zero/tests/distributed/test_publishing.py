"""New parameters are sent while the optimizer still updates others, in the order in which the next forward pass needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from colossal_core import moments
from colossal_core.testing import RunSpec, WorkerPool, compare, table
from colossal_core.testing.models import TinyModel, TokenBatches
from colossal_core.testing.parity import oracle_of, share_of_step, start
from colossal_core.testing.probes import forget_traffic, record, traffic
from colossal_zero.flat_bucket import FlatBucket
from colossal_zero.flat_state import FlatState

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.testing.parity import RunRecord


def spec_of(stage: int) -> RunSpec:
    zero = {"stage": stage, "bucket_bytes": 9000}
    config = {"batch": {"global_size": 4, "micro_size": 1}, "precision": "fp64", "parallel": {"zero": zero}}
    return RunSpec(config, TinyModel(), TokenBatches(), task="causal-lm")


@contextmanager
def portions_of_one() -> Iterator[None]:
    """Optimizers that are built inside say after every single master that they are done with it."""
    usual = moments.PORTION_ELEMENTS
    vars(moments)["PORTION_ELEMENTS"] = 1
    try:
        yield
    finally:
        vars(moments)["PORTION_ELEMENTS"] = usual


def gathered(collectives: Collectives) -> list[str]:
    return [row.tag for row in traffic(collectives) if row.operation == "all_gather"]


def one_by_one(collectives: Collectives, spec: RunSpec) -> RunRecord:
    """The record of a run with such an optimizer."""
    with portions_of_one():
        return record(collectives, spec)


def sent_when_published(collectives: Collectives, spec: RunSpec) -> tuple[list[str], list[str], set[str]]:
    """What the second step had sent when the optimizer was done, and what it sent in all, both in order; what lies outside every block."""
    with portions_of_one():
        trained = start(spec, collectives)
    state = trained._engine.state
    trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
    state.wait_published()
    forget_traffic(collectives)
    before: list[str] = []
    publish = state.publish

    def noted() -> None:
        before.extend(gathered(collectives))
        publish()

    vars(state)["publish"] = noted
    trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 1))
    plan = trained.plan
    buckets: Any = plan.data["zero"]["buckets"]
    outside = [index for index, names in enumerate(buckets) if plan.layouts[names[0]].block not in plan.block_names]
    return before, gathered(collectives), {f"parameter bucket {index}" for index in outside}


@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_are_sent_while_others_are_updated(pool: WorkerPool, stage: int) -> None:
    before, everything, outside = pool.run(2, sent_when_published, spec_of(stage))[0]
    assert before == everything
    assert len(everything) > len(outside) > 1
    assert set(everything[: len(outside)]) == outside  # the model asks for these first


def gathered_around_publishing(
    collectives: Collectives, spec: RunSpec
) -> tuple[list[str], list[str], list[str], list[str]]:
    """Gathers between the last reduction and `publish`, in `publish`, and in a forward pass after the step; each bucket's unit."""
    with portions_of_one():
        trained = start(spec, collectives)
    state = trained._engine.state
    finish_reduce, publish = state.finish_reduce, state.publish
    found: list[list[str]] = []

    def forget() -> None:
        finish_reduce()
        forget_traffic(collectives)

    def noted() -> None:
        found.append(gathered(collectives))
        forget_traffic(collectives)
        publish()
        found.append(gathered(collectives))
        forget_traffic(collectives)

    vars(state).update(finish_reduce=forget, publish=noted)
    share = share_of_step(spec, trained.plan, collectives.rank, 0)
    trained.train_step(share)
    trained.eval_step({key: value[:1] for key, value in share.items()})
    buckets: Any = trained.plan.data["zero"]["buckets"]
    return found[0], found[1], gathered(collectives), [trained.plan.layouts[names[0]].block for names in buckets]


def test_stage_3_gathers_early_what_the_next_pass_begins_with(pool: WorkerPool) -> None:
    """The units outside every block, then the first block: beside the optimizer, and not again in the next forward pass."""
    for early, published, evaluated, units in pool.run(2, gathered_around_publishing, spec_of(3)):
        named = [[units[int(tag.removeprefix("parameter bucket "))] for tag in tags] for tags in (early, evaluated)]
        assert named == [["tokens", "positions", "norm", "blocks.0"], ["blocks.1"]]
        assert published == []


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_optimizers_that_say_nothing_before_they_are_done_have_nothing_gathered_early(
    pool: WorkerPool, name: str
) -> None:
    spec = spec_of(3).with_overrides({"optimizer.name": name})
    for early, published, evaluated, units in pool.run(2, gathered_around_publishing, spec):
        assert [*early, *published] == []
        assert len(evaluated) == len(units)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_is_exact(pool: WorkerPool, stage: int) -> None:
    oracle = pool.run(1, record, oracle_of(spec_of(stage)))[0]
    rows = compare(pool.run(2, one_by_one, spec_of(stage)), oracle)
    assert all(row.passed for row in rows), f"\n{table(rows)}"


def copied_by_optimizer(
    collectives: Collectives, spec: RunSpec, asked: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[bool]]:
    """Parameters as the model has them and as masters after some steps, and, for each refresh of a bucket, whether the optimizer had
    written the new values into the compute copy. asked: False: the optimizer is told of no copies.
    """
    patch = pytest.MonkeyPatch()
    found: list[bool] = []
    refresh = FlatBucket.refresh

    def noted(bucket: FlatBucket, *, copied: bool) -> None:
        found.append(copied)
        refresh(bucket, copied=copied)

    patch.setattr(FlatBucket, "refresh", noted)
    if not asked:
        patch.setattr(FlatState, "copies", lambda state, masters: None)
    try:
        trained = start(spec, collectives)
        found.clear()  # those of the first values
        for step in range(3):
            trained.train_step(share_of_step(spec, trained.plan, collectives.rank, step))
    finally:
        patch.undo()
    trained._engine.state.wait_published()
    names = list(trained.plan.layouts)
    computed = [trained._engine.state.shards[name].parameter.detach().clone() for name in names]
    return computed, [trained.full_parameter(name) for name in names], found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "keys", [{"name": "adamw"}, {"name": "lion", "states": "int8"}, {"name": "sgd"}, {"name": "lamb"}]
)
def test_the_optimizer_writes_the_compute_copies(pool: WorkerPool, keys: dict[str, str], stage: int) -> None:
    """Bit for bit what a pass of its own after the optimizer would write; under stage 3 the copy is not there yet."""
    overrides = {"precision": "bf16", **{f"optimizer.{key}": value for key, value in keys.items()}}
    spec = spec_of(stage).with_overrides(overrides)
    runs = zip(pool.run(2, copied_by_optimizer, spec, True), pool.run(2, copied_by_optimizer, spec, False), strict=True)
    for (computed, masters, copied), (wanted, same_masters, never) in runs:
        assert all(torch.equal(one, other) for one, other in zip(masters, same_masters, strict=True))
        if stage < 3:
            assert all(torch.equal(one, other) for one, other in zip(computed, wanted, strict=True))
            assert all(torch.equal(one, master.bfloat16()) for one, master in zip(computed, masters, strict=True))
            assert copied
            assert set(copied) == {keys["name"] != "lamb"}
        assert not any(never)
