"""Bytes that every rank sends along tp, read from the ledger, beside the formula: equal to the byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from colossal_comm.ledger import ring_bytes
from colossal_core.estimate import EstimateTable, HardwareProfile, ModelSize
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.parity import prepare
from colossal_tensor.config import TensorConfig
from colossal_tensor.cost import estimate_tensor

Sized = Callable[..., RunSpec]
Sends = Callable[[RunSpec, int], None]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_whole_step(sized_run: Sized, sends_as_estimated: Sends, name: str, ranks: int, sequence: bool) -> None:
    """With 4 ranks, key/value heads of the Llama are on two ranks each, and their gradients are summed."""
    sends_as_estimated(sized_run(name, ranks, sequence), ranks)


def test_a_step_of_ranks_with_other_heads(sized_run: Sized, sends_as_estimated: Sends) -> None:
    """4 heads over 3 ranks."""
    sends_as_estimated(sized_run("gpt2", 3, True, config={"precision": "fp64"}), 3)


@pytest.mark.parametrize(("sequence", "mode"), [(False, "full"), (True, "full"), (True, "selective")])
def test_blocks_that_are_recomputed_send_again(
    sized_run: Sized, sends_as_estimated: Sends, sequence: bool, mode: str
) -> None:
    sends_as_estimated(sized_run("llama", 2, sequence, config={"recompute": {"mode": mode}}), 2)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_layer(sized_run: Sized, sent_by_ranks: Any, name: str, sequence: bool) -> None:
    """What one layer more sends in a microbatch: Megatron's four all-reduces of A bytes, or four all-gathers and four reduce-scatters of
    which two all-gathers more bring back what products have not kept.
    """
    totals = []
    for layers in (2, 3):
        spec = sized_run(name, 2, sequence, layers=layers, width=64)
        plan = prepare(spec, 2).plan
        rows = sent_by_ranks(spec, plan)[0]
        totals.append(sum(size for kind, size in rows.items() if kind[2] != "gradient shards"))
    assert isinstance(spec.batch, TokenBatches)
    activation = plan.batch.micro_size * spec.batch.length * 64 * 4
    layer = 4 * ring_bytes("all_reduce", 2, activation)
    if sequence:
        layer = (4 + 2) * ring_bytes("all_gather", 2, activation) + 4 * ring_bytes("reduce_scatter", 2, activation)
    assert totals[1] - totals[0] == plan.batch.num_microbatches * layer


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
