"""Runs whose bytes are estimated: what their ranks send and keep, beside what the formulas say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from colossal_comm import RankCollectives, run_simulated
from colossal_core.memory_report import live_bytes
from colossal_core.peak_estimate import state_table
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.parity import prepare, share_of_step, start
from colossal_tensor.cost import Kind, Microbatch, sent_bytes

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.plan import Plan

LENGTH, MICRO_SIZE, NUM_MICROBATCHES = 24, 2, 2
ELEMENT_BYTES = {"fp32": 4, "fp64": 8}
STATE = {
    "parameters": "parameter_bytes",
    "masters": "master_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
}
SIZES = {
    "llama": ("num_hidden_layers", "hidden_size", "intermediate_size"),
    "gpt2": ("n_layer", "n_embd", "n_inner"),
}


@pytest.fixture(scope="session")
def sized_run(run_of: Callable[..., RunSpec]) -> Callable[..., RunSpec]:
    """(kind, tensor ranks, sequence_parallel) -> a run of a small model in float32, two microbatches of two texts on every rank that
    shares the data; layers, width and words of the model, `shards` of these ranks, and further values of the config by dotted path.
    """

    def sized(
        kind: str,
        ranks: int,
        sequence_parallel: bool,
        *,
        layers: int = 2,
        width: int = 64,
        vocab_size: int = 250,
        shards: int = 1,
        config: Mapping[str, Any] | None = None,
    ) -> RunSpec:
        values = {
            "batch": {"global_size": MICRO_SIZE * NUM_MICROBATCHES * shards, "micro_size": MICRO_SIZE},
            "precision": "fp32",
            "optimizer": {},
            "parallel.tensor": {"size": ranks, "sequence_parallel": sequence_parallel},
            **(config or {}),
        }
        sizes = dict(zip(SIZES[kind], (layers, width, width * 11 // 4), strict=True))
        spec = run_of(kind, values, {**sizes, "vocab_size": vocab_size})
        return replace(spec, batch=TokenBatches(vocab_size, LENGTH))

    return sized


def sent_along_tp(spec: RunSpec, plan: Plan) -> list[Mapping[Kind, int]]:
    """What the ledger of each rank says of the second step."""

    def one(collectives: Collectives) -> Mapping[Kind, int]:
        assert isinstance(collectives, RankCollectives)
        trained = start(spec, collectives)
        trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
        collectives.ledger.reset()
        trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 1))
        return {
            (row.axes, row.operation, row.tag): row.sent_bytes
            for row in collectives.ledger.rows()
            if any(axis.startswith("tp") for axis in row.axes) and row.tag != "loss and norm"
        }

    return run_simulated(plan.mesh, one)


@pytest.fixture(scope="session")
def sent_by_ranks() -> Callable[[RunSpec, Plan], list[Mapping[Kind, int]]]:
    """(run, its plan) -> of every rank, the bytes that it sends along tp in a step, by axes, operation and tag."""
    return sent_along_tp


@pytest.fixture(scope="session")
def sends_as_estimated() -> Callable[[RunSpec, int], None]:
    """(run, number of ranks) -> every rank sends what the formula says, to the byte."""

    def check(spec: RunSpec, world_size: int) -> None:
        prepared = prepare(spec, world_size)
        plan, element_bytes = prepared.plan, ELEMENT_BYTES[prepared.config.precision]
        batch, recompute = Microbatch(MICRO_SIZE, LENGTH, element_bytes), "recompute" in spec.config
        for rank, found in enumerate(sent_along_tp(spec, plan)):
            expected = sent_bytes(plan, batch, NUM_MICROBATCHES, element_bytes, rank=rank, recompute=recompute)
            assert found == expected, f"rank {rank}"
        table = state_table(plan, prepared.strategies, 8.0, positions=LENGTH)
        of_first = sent_bytes(plan, batch, NUM_MICROBATCHES, element_bytes, recompute=recompute)
        assert table.column("bytes_tp")[0] == sum(of_first.values()) > 0

    return check


@pytest.fixture(scope="session")
def keeps_as_estimated() -> Callable[[RunSpec, int], None]:
    """(run, number of ranks) -> the fullest rank has the state that the estimate says, kind by kind, within 3 %."""

    def check(spec: RunSpec, world_size: int) -> None:
        prepared = prepare(spec, world_size)

        def live(collectives: Collectives) -> Mapping[str, int]:
            trained = start(spec, collectives)
            trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
            trained._engine.state.wait_published()
            return live_bytes(trained)

        found = run_simulated(prepared.plan.mesh, live)
        table = state_table(prepared.plan, prepared.strategies, 16.0 if prepared.config.precision == "fp64" else 8.0)
        for kind, column in STATE.items():
            measured, formula = max(rank[kind] for rank in found), float(table.column(column)[0])
            told = f"{kind}: measured {measured}, formula {formula:.0f}"
            assert abs(measured - formula) <= max(0.03 * formula, 64), told

    return check
