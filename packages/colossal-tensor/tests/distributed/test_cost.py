"""Bytes that every rank sends along tp, read from the ledger, beside the formula: equal to the byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from colossal_comm import RankCollectives, run_simulated
from colossal_comm.ledger import ring_bytes
from colossal_core.estimate import EstimateTable, HardwareProfile, ModelSize
from colossal_core.peak_estimate import state_table
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.parity import prepare, share_of_step, start
from colossal_tensor.config import TensorConfig
from colossal_tensor.cost import Kind, Microbatch, estimate_tensor, sent_bytes

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.collectives import Collectives
    from colossal_core.plan import Plan

LENGTH, WIDTH, MICRO_SIZE, NUM_MICROBATCHES = 24, 64, 2, 2
ELEMENT_BYTES = {"fp32": 4, "fp64": 8}
Models = Callable[..., Callable[[], "nn.Module"]]


@pytest.fixture
def small_model(run_of: Callable[..., RunSpec]) -> Models:
    """(kind, layers, width, vocabulary) -> what builds such a model."""

    def sized(kind: str, layers: int = 2, width: int = 64, vocab_size: int = 250) -> Callable[[], nn.Module]:
        names = ("num_hidden_layers", "hidden_size", "intermediate_size")
        if kind == "gpt2":
            names = ("n_layer", "n_embd", "n_inner")
        sizes = dict(zip(names, (layers, width, width * 11 // 4), strict=True))
        built = run_of(kind, {}, {**sizes, "vocab_size": vocab_size}).model
        assert not isinstance(built, str)
        return built

    return sized


def spec_of(
    model: Callable[[], nn.Module], ranks: int, sequence: bool, *, shards: int = 1, precision: str = "fp32", **more: Any
) -> RunSpec:
    parallel = {"tensor": {"size": ranks, "sequence_parallel": sequence}, **more.pop("parallel", {})}
    batch = {"global_size": MICRO_SIZE * NUM_MICROBATCHES * shards, "micro_size": MICRO_SIZE}
    config = {"batch": batch, "precision": precision, "parallel": parallel, **more}
    return RunSpec(config, model, TokenBatches(vocab_size=250, length=LENGTH), task="causal-lm")


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


def check(spec: RunSpec, world_size: int, *, recompute: bool = False) -> None:
    prepared = prepare(spec, world_size)
    plan, element_bytes = prepared.plan, ELEMENT_BYTES[prepared.config.precision]
    batch = Microbatch(MICRO_SIZE, LENGTH, element_bytes)
    for rank, found in enumerate(sent_along_tp(spec, plan)):
        expected = sent_bytes(plan, batch, NUM_MICROBATCHES, element_bytes, rank=rank, recompute=recompute)
        assert found == expected, f"rank {rank}"
    table = state_table(plan, prepared.strategies, 8.0, positions=LENGTH)
    of_first = sent_bytes(plan, batch, NUM_MICROBATCHES, element_bytes, recompute=recompute)
    assert table.column("bytes_tp")[0] == sum(of_first.values()) > 0


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_whole_step(small_model: Models, name: str, ranks: int, sequence: bool) -> None:
    """With 4 ranks, key/value heads of the Llama are on two ranks each, and their gradients are summed."""
    check(spec_of(small_model(name), ranks, sequence), ranks)


def test_a_step_of_ranks_with_other_heads(small_model: Models) -> None:
    """4 heads over 3 ranks."""
    check(spec_of(small_model("gpt2"), 3, True, precision="fp64"), 3)


@pytest.mark.parametrize(("sequence", "mode"), [(False, "full"), (True, "full"), (True, "selective")])
def test_blocks_that_are_recomputed_send_again(small_model: Models, sequence: bool, mode: str) -> None:
    check(spec_of(small_model("llama"), 2, sequence, recompute={"mode": mode}), 2, recompute=True)


@pytest.mark.parametrize("stage", [0, 3])
def test_shards_of_partial_gradients(small_model: Models, stage: int) -> None:
    """What is summed once a step is what a data-parallel rank keeps."""
    pytest.importorskip("colossal_zero")
    check(spec_of(small_model("llama"), 2, True, shards=2, parallel={"zero": {"stage": stage}}), 4)


def test_copies_of_hybrid_sharding_sum_in_the_same_message(small_model: Models) -> None:
    pytest.importorskip("colossal_zero")
    zero = {"stage": 1, "replicate": 2}
    check(spec_of(small_model("gpt2"), 2, True, shards=2, parallel={"zero": zero}), 4)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_layer(small_model: Models, name: str, sequence: bool) -> None:
    """What one layer more sends in a microbatch: Megatron's four all-reduces of A bytes, or four all-gathers and four reduce-scatters of
    which two all-gathers more bring back what products have not kept.
    """
    totals = []
    for layers in (2, 3):
        spec = spec_of(small_model(name, layers), 2, sequence)
        rows = sent_along_tp(spec, prepare(spec, 2).plan)[0]
        totals.append(sum(size for kind, size in rows.items() if kind[2] != "gradient shards"))
    activation = MICRO_SIZE * LENGTH * WIDTH * ELEMENT_BYTES["fp32"]
    layer = 4 * ring_bytes("all_reduce", 2, activation)
    if sequence:
        layer = (4 + 2) * ring_bytes("all_gather", 2, activation) + 4 * ring_bytes("reduce_scatter", 2, activation)
    assert totals[1] - totals[0] == NUM_MICROBATCHES * layer


def test_candidates_by_sizes_alone() -> None:
    """Two groups a block, embedding and head; nothing where nothing is cut."""
    model = ModelSize(1000, 1000, 3, 300, 8, 16, 100, 2)
    inputs = {name: np.array(values, dtype=float) for name, values in {
        "pp": [1, 1], "dp_replicate": [1, 1], "dp_shard": [1, 1], "cp": [1, 1], "tp": [1, 4], "micro_size": [2, 2],
        "num_microbatches": [5, 5],
    }.items()}  # fmt: skip
    profile = HardwareProfile("any", 1.0, 1.0, 1.0, 1.0, 0.0)
    activation = 2 * 16 * 8 * 2
    for sequence, of_block in ((False, 8), (True, 10)):
        config = TensorConfig(size=4, sequence_parallel=sequence)
        table = estimate_tensor(EstimateTable(model, inputs), profile, config)
        assert table.column("bytes_tp").tolist() == [0.0, 5 * 0.75 * (3 * of_block + 4) * activation]
