"""Two GPUs through NCCL give what one CPU process gives, in float64: every stage, with microbatches and clipping."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from colossal_core.testing import Oracles, RunSpec, WorkerPool, compare, table
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.probes import record

pytestmark = pytest.mark.gpu
NUM_RANKS = 2


def spec_of(stage: int) -> RunSpec:
    """Three steps of AdamW with two microbatches a rank, clipped, in buckets that are smaller than some parameters."""
    config = {
        "batch": {"global_size": 8, "micro_size": 2},
        "precision": "fp64",
        "optimizer": {"lr": 1.0e-3, "max_grad_norm": 0.1},
        "parallel": {"zero": {"stage": stage, "bucket_bytes": 9000}},
    }
    return RunSpec(config, TinyModel(TinyOptions(dropout=0.1, unused=True)), TokenBatches(), task="causal-lm")


@pytest.fixture(scope="module")
def gpus() -> Iterator[WorkerPool]:
    if torch.accelerator.device_count() < NUM_RANKS:
        pytest.skip(f"needs {NUM_RANKS} GPUs")
    with WorkerPool(240.0, device_type="cuda") as pool:
        yield pool


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_gpus_are_one_process(gpus: WorkerPool, stage: int) -> None:
    spec = spec_of(stage)
    rows = compare(gpus.run(NUM_RANKS, record, spec), Oracles().of(spec))
    assert all(row.passed for row in rows), f"\n{table(rows)}"
