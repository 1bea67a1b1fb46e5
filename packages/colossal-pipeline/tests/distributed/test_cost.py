"""What the estimate says of a pipeline, beside real runs: bytes sent to the byte, the state that each rank keeps, and activations alive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from colossal_comm import RankCollectives, run_simulated, silent_rank
from colossal_core.estimate import EstimateTable, HardwareProfile, ModelSize
from colossal_core.examine import examine
from colossal_core.loss import LossOwner
from colossal_core.memory_report import live_bytes
from colossal_core.ops import build_op_table
from colossal_core.ops.reference import reference_ops
from colossal_core.peak_estimate import Peak, PeakEstimator, state_table
from colossal_core.rank_compute import rank_compute
from colossal_core.testing import RunSpec
from colossal_core.testing.parity import Prepared, prepare, share_of_step, start
from colossal_pipeline.checker import peak_activations
from colossal_pipeline.config import PipelineConfig
from colossal_pipeline.cost import alive, estimate_pipeline, sent_tensors, stage_shares

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.rank_compute import RankCompute
    from colossal_core.trained import Trained

Run = Callable[..., RunSpec]

LENGTH, WIDTH, MICROBATCHES = 8, 32, 4
STATE = {
    "parameters": "parameter_bytes",
    "masters": "master_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
}


def sent_along_pp(spec: RunSpec, prepared: Prepared) -> list[int]:
    """What the ledger of each rank says of the second step, and all its messages are activations or gradients."""

    def one(collectives: Collectives) -> int:
        assert isinstance(collectives, RankCollectives)
        trained = start(spec, collectives)
        trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
        collectives.ledger.reset()
        trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 1))
        rows = [row for row in collectives.ledger.rows() if row.operation == "exchange"]
        assert {row.tag for row in rows} <= {"activations", "gradients"}, rows
        assert all(row.axes == ("pp",) for row in rows), rows
        return sum(row.sent_bytes for row in rows)

    return run_simulated(prepared.plan.mesh, one)


@pytest.mark.parametrize(
    ("kind", "schedule", "ranks"),
    [("llama", "1f1b", 4), ("llama", "interleaved", 2), ("llama", "zbv", 2), ("gpt2", "1f1b", 2)],
)
def test_bytes_of_a_step(run_of: Run, kind: str, schedule: str, ranks: int) -> None:
    """Every rank to the byte; the estimate is of the one that sends most. No message tells shapes after the first step."""
    spec = run_of(kind, {"parallel.pipeline": {"size": ranks, "schedule": schedule}}, microbatches=MICROBATCHES)
    prepared = prepare(spec, ranks)
    stream = LENGTH * WIDTH * 8  # one sequence, in float64
    found = sent_along_pp(spec, prepared)
    assert found == [count * stream for count in sent_tensors(prepared.plan)]
    table = state_table(prepared.plan, prepared.strategies, 16.0, positions=LENGTH)
    assert table.column("bytes_pp")[0] == max(found) > 0


def test_bytes_of_two_chains(run_of: Run) -> None:
    """Between the stages of T5's decoder four tensors cross: the stream, the encoder's output, and for each pair of positions a bias of
    attention and one of attention to the encoder. Here these have as many elements as a stream, which the estimate takes them for. The
    last is a mask without parameters and gets no gradient, which the estimate does not know: the last rank sends less.
    """
    spec = run_of("t5", {"parallel.pipeline": {"size": 4}}, microbatches=MICROBATCHES)
    prepared = prepare(spec, 4)
    stream = LENGTH * WIDTH * 8
    counted = sent_tensors(prepared.plan)
    assert counted == [count * MICROBATCHES for count in (2, 3, 5, 4)]
    assert sent_along_pp(spec, prepared) == [count * MICROBATCHES * stream for count in (2, 3, 5, 3)]


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize(("kind", "schedule"), [("llama", "1f1b"), ("gpt2", "1f1b"), ("gpt2", "zbv")])
def test_state_of_the_fullest_rank(run_of: Run, kind: str, schedule: str, precision: str) -> None:
    """Kind by kind within 3 %: a tied head of GPT-2 is on both ends."""
    spec = run_of(kind, {"parallel.pipeline": {"size": 2, "schedule": schedule}, "precision": precision})
    prepared = prepare(spec, 2)

    def live(collectives: Collectives) -> Mapping[str, int]:
        trained = start(spec, collectives)
        trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
        trained._engine.state.wait_published()
        return live_bytes(trained)

    found = run_simulated(prepared.plan.mesh, live)
    table = state_table(prepared.plan, prepared.strategies, 16.0 if precision == "fp64" else 8.0)
    for kept, column in STATE.items():
        measured, formula = max(rank[kept] for rank in found), float(table.column(column)[0])
        assert abs(measured - formula) <= max(0.03 * formula, 64), f"{kept}: measured {measured}, formula {formula:.0f}"


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "interleaved", "zbv"])
def test_activations_in_flight(run_of: Run, schedule: str) -> None:
    """Stages of equal blocks: the share of the model that is alive is the program's peak, by the number of stages."""
    spec = run_of("llama", {"parallel.pipeline": {"size": 2, "schedule": schedule}}, microbatches=MICROBATCHES)
    prepared = prepare(spec, 2)
    program = prepared.plan.program
    table = state_table(prepared.plan, prepared.strategies, 16.0, positions=LENGTH)
    assert stage_shares(prepared.plan) == [1 / program.num_stages] * program.num_stages
    expected = [count / program.num_stages for count in peak_activations(program)]
    assert alive(program, stage_shares(prepared.plan)) == expected
    assert table.column("num_microbatches_in_flight").tolist() == [max(expected)]


def test_candidates_by_sizes_alone() -> None:
    """One row without a pipeline, and two with one: 1F1B sends every microbatch on and back, and the first rank holds as many as ranks."""
    model = ModelSize(1000, 1000, 4, 200, 8, 16, 100, 2)
    inputs = {name: np.array(values, dtype=float) for name, values in {
        "pp": [1, 2, 4], "dp_replicate": [1] * 3, "dp_shard": [1] * 3, "cp": [1] * 3, "tp": [1] * 3, "micro_size": [2] * 3,
        "num_microbatches": [5] * 3,
    }.items()}  # fmt: skip
    profile = HardwareProfile("any", 1.0, 1.0, 1.0, 1.0, 0.0)
    table = estimate_pipeline(EstimateTable(model, inputs), profile, PipelineConfig(size=2))
    stream = 2 * 16 * 8 * 2
    assert table.column("bytes_pp").tolist() == [0.0, 5 * stream, 10 * stream]
    assert table.column("num_microbatches_in_flight").tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_trace_is_of_the_whole_model(run_of: Run, tensor: int) -> None:
    """Before training and in it, on every rank, whatever that rank holds: GPipe keeps four microbatches of one of two stages, and so twice
    what the model keeps without stages.
    """
    overrides: dict[str, Any] = {"parallel.pipeline": {"size": 2, "schedule": "gpipe"}, "precision": "fp32"}
    whole: dict[str, Any] = {"precision": "fp32"}
    if tensor > 1:
        pytest.importorskip("colossal_tensor")
        whole["parallel.tensor"] = overrides["parallel.tensor"] = {"size": tensor}
    spec, alone = run_of("llama", overrides), run_of("llama", whole)
    expected = estimated(prepare(alone, tensor), alone)
    before = estimated(prepare(spec, 2 * tensor), spec)
    assert expected.problem == before.problem == ""
    assert before.activations == 2 * expected.activations > 0
    assert before.work == expected.work

    def one(collectives: Collectives) -> Trained:
        trained = start(spec, collectives)
        trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
        return trained

    prepared = prepare(spec, 2 * tensor)
    for trained in run_simulated(prepared.plan.mesh, one):
        engine = trained._engine
        during = estimated(replace(prepared, model=engine.model), spec, engine.context.computes)
        assert (during.problem, during.activations, during.work) == ("", before.activations, before.work)


def estimated(prepared: Prepared, spec: RunSpec, computes: RankCompute | None = None) -> Peak:
    """computes: of a model that is in training."""
    plan = prepared.plan
    estimator = PeakEstimator(
        prepared.model,
        plan,
        prepared.strategies,
        LossOwner(examine(prepared.model), build_op_table(reference_ops(), "cpu", "float32"), None),
        share_of_step(spec, plan, 0, 0),
        state_bytes=8.0,
        device_type="cpu",
        computes=computes or rank_compute(plan, prepared.strategies, silent_rank(plan.mesh)),
    )
    return estimator.estimate()
