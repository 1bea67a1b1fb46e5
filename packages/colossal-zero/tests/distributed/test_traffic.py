"""What stages 0 and 1 send: the bytes of the formulas, once a step, however many microbatches there are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from colossal_comm.ledger import ring_bytes
from colossal_core.testing import RunSpec, WorkerPool
from colossal_core.testing.models import TinyModel, TokenBatches
from colossal_core.testing.parity import prepare, share_of_step, start
from colossal_core.testing.probes import Traffic, forget_traffic, traffic
from colossal_zero.plan import bucket_shape

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.plan import Plan
    from colossal_core.strategy import StepView

ELEMENT_BYTES = 8


def spec_of(stage: int, micro_size: int, replicate: int = 1) -> RunSpec:
    zero = {"stage": stage, "bucket_bytes": 9000, "replicate": replicate}
    config = {"batch": {"global_size": 16, "micro_size": micro_size}, "precision": "fp64", "parallel": {"zero": zero}}
    return RunSpec(config, TinyModel(), TokenBatches(), task="causal-lm")


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


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("stage", [0, 1])
def test_bytes_are_those_of_the_formula(pool: WorkerPool, stage: int, world_size: int) -> None:
    spec = spec_of(stage, 1)
    sizes = bucket_bytes(prepare(spec, world_size).plan)
    assert len(sizes) > 3
    axes = ("dp_shard", "cp")
    expected = {}
    for index, size in enumerate(sizes):
        operation = "reduce_scatter" if stage else "all_reduce"
        expected[axes, operation, f"gradient bucket {index}"] = (1, ring_bytes(operation, world_size, size))
        if stage:
            expected[axes, "all_gather", f"parameter bucket {index}"] = (1, ring_bytes("all_gather", world_size, size))
    for rows, _ in pool.run(world_size, one_step, spec):
        sent = {row.kind: (row.num_calls, row.sent_bytes) for row in rows if "bucket" in row.tag}
        assert sent == expected
        rest = [row for row in rows if "bucket" not in row.tag]
        assert sorted((row.tag, row.num_calls) for row in rest) == [("items", 1), ("loss and norm", 1)]
        assert sum(row.sent_bytes for row in rest) < 100


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
