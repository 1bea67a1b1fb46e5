"""What every stage sends: the bytes and the number of collectives of the formulas, counted by the ledger.

Stages 0 and 1 send once a step, however many microbatches there are; stage 2 reduces in each, and stage 3 gathers as its policy says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from colossal_comm.ledger import ring_bytes
from colossal_core.testing import RunSpec, WorkerPool
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.parity import prepare, share_of_step, start
from colossal_core.testing.probes import Traffic, forget_traffic, traffic
from colossal_zero.plan import bucket_shape

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.plan import Plan
    from colossal_core.strategy import StepView

ELEMENT_BYTES = 8


def spec_of(stage: int, micro_size: int, replicate: int = 1, **more: Any) -> RunSpec:
    zero = {"stage": stage, "bucket_bytes": 9000, "replicate": replicate, **more}
    config = {"batch": {"global_size": 16, "micro_size": micro_size}, "precision": "fp64", "parallel": {"zero": zero}}
    return RunSpec(config, TinyModel(TinyOptions(num_blocks=3)), TokenBatches(), task="causal-lm")


def one_step(collectives: Collectives, spec: RunSpec) -> tuple[tuple[Traffic, ...], list[int]]:
    """The traffic of the second step, and how many gradient collectives had started before each microbatch of it."""
    trained = start(spec, collectives)
    before: list[int] = []

    def count(view: StepView) -> None:
        del view
        before.append(sum(row.num_calls for row in traffic(collectives) if row.tag.startswith("gradient")))

    trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
    assert trained.module is not None  # waits for the parameters that the first step sent
    forget_traffic(collectives)
    trained._engine.context.hooks.add("before_microbatch", count)
    trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 1))
    return traffic(collectives), before


def bucket_bytes(plan: Plan) -> list[int]:
    """Bytes of each bucket's flat buffer."""
    buckets: Any = plan.data["zero"]["buckets"]
    shards = plan.mesh.size(("dp_shard", "cp"))
    lengths = [
        bucket_shape([math.prod(plan.layouts[name].shape) for name in bucket], shards).length for bucket in buckets
    ]
    return [length * ELEMENT_BYTES for length in lengths]


AXES = ("dp_shard", "cp")


def expected_traffic(
    plan: Plan, stage: int, gathers: Callable[[str], int], *, once: bool = False
) -> dict[tuple[tuple[str, ...], str, str], tuple[int, int]]:
    """gathers: how often a unit's bucket is gathered in a step. once: gradients are reduced so, whatever the stage."""
    world_size, count = plan.mesh.world_size, plan.batch.num_microbatches
    found: dict[tuple[tuple[str, ...], str, str], tuple[int, int]] = {}
    buckets: Any = plan.data["zero"]["buckets"]
    for index, (size, names) in enumerate(zip(bucket_bytes(plan), buckets, strict=True)):
        operation, reductions = ("reduce_scatter" if stage else "all_reduce"), (1 if stage < 2 or once else count)
        if plan.layouts[names[0]].trainable:
            sent = reductions * ring_bytes(operation, world_size, size)
            found[AXES, operation, f"gradient bucket {index}"] = (reductions, sent)
        times = gathers(plan.layouts[names[0]].block)
        if times:
            sent = times * ring_bytes("all_gather", world_size, size)
            found[AXES, "all_gather", f"parameter bucket {index}"] = (times, sent)
    return found


def check(
    pool: WorkerPool, spec: RunSpec, world_size: int, stage: int, gathers: Callable[[str], int], *, once: bool = False
) -> None:
    plan = prepare(spec, world_size).plan
    assert len(bucket_bytes(plan)) > 3
    expected = expected_traffic(plan, stage, gathers, once=once)
    for rows, _ in pool.run(world_size, one_step, spec):
        sent = {row.kind: (row.num_calls, row.sent_bytes) for row in rows if "bucket" in row.tag}
        assert sent == expected
        rest = [row for row in rows if "bucket" not in row.tag]
        assert sorted((row.tag, row.num_calls) for row in rest) == [("items", 1), ("loss and norm", 1)]
        assert sum(row.sent_bytes for row in rest) < 100


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bytes_are_those_of_the_formula(pool: WorkerPool, stage: int, world_size: int) -> None:
    """Parameters are gathered once a step, whatever is done with the gradients."""
    check(pool, spec_of(stage, 2), world_size, stage, lambda unit: 1 if stage else 0)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("keep", ["use", "microbatch", "step"])
def test_parameters_of_stage_3_are_gathered_as_its_policy_says(pool: WorkerPool, keep: str, prefetch: int) -> None:
    """With four microbatches. `use`: blocks twice in each, what is outside of them once."""

    def gathers(unit: str) -> int:
        again = keep == "use" and unit.startswith("blocks")
        return (1 if keep == "step" else 4) * (2 if again else 1)

    check(pool, spec_of(3, 2, keep_parameters=keep, prefetch=prefetch), 2, 3, gathers)


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_kept_for_the_step_are_reduced_once(pool: WorkerPool, stage: int) -> None:
    kept: dict[str, Any] = {"keep_gradients": "step"} | ({"keep_parameters": "step"} if stage == 3 else {})
    check(pool, spec_of(stage, 2, **kept), 2, stage, lambda unit: 1, once=True)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_in_bf16_are_half_the_bytes(pool: WorkerPool, stage: int) -> None:
    def gradient_bytes(dtype: str) -> int:
        spec = spec_of(stage, 8, reduce_dtype=dtype).with_overrides({"precision": "bf16"})
        rows = pool.run(2, one_step, spec)[0][0]
        return sum(row.sent_bytes for row in rows if row.tag.startswith("gradient bucket"))

    assert gradient_bytes("fp32") == 2 * gradient_bytes("bf16") > 0


@pytest.mark.parametrize("keep", ["use", "step"])
def test_evaluation_gathers_every_unit_once(pool: WorkerPool, keep: str) -> None:
    """A microbatch of evaluation gathers and releases, and sends nothing else but the loss."""
    spec = spec_of(3, 8, keep_parameters=keep)
    for rows in pool.run(2, one_evaluation, spec):
        assert {row.num_calls for row in rows if row.tag.startswith("parameter bucket")} == {1}
        rest = {row.tag for row in rows if not row.tag.startswith("parameter bucket")}
        assert rest == {"loss and norm"}


def one_evaluation(collectives: Collectives, spec: RunSpec) -> tuple[Traffic, ...]:
    trained = start(spec, collectives)
    forget_traffic(collectives)
    trained.eval_step(share_of_step(spec, trained.plan, collectives.rank, 0))
    return traffic(collectives)


def test_copies_sum_their_shards_once_a_step(pool: WorkerPool) -> None:
    """Hybrid sharding sends, between the copies, one all-reduce of the shards' gradients."""
    spec = spec_of(1, 1, replicate=2)
    plan = prepare(spec, 4).plan
    for rank, (rows, _) in enumerate(pool.run(4, one_step, spec)):
        own = [layout.state.local_shape(plan.mesh.coordinate(rank), plan.mesh) for layout in plan.layouts.values()]
        shards = sum(math.prod(shape) for shape in own) * ELEMENT_BYTES
        between = [row for row in rows if row.axes == ("dp_replicate",)]
        assert [(row.operation, row.num_calls, row.sent_bytes) for row in between] == [
            ("all_reduce", 1, ring_bytes("all_reduce", 2, shards))
        ]


@pytest.mark.parametrize("stage", [0, 1])
def test_nothing_is_sent_between_microbatches(pool: WorkerPool, stage: int) -> None:
    """Four microbatches send what one sends, all of it after the last one's forward pass."""
    several, whole = pool.run(2, one_step, spec_of(stage, 2))[0], pool.run(2, one_step, spec_of(stage, 8))[0]
    assert several[0] == whole[0]
    assert several[1] == [0, 0, 0, 0]
    assert whole[1] == [0]
