"""Two GPUs through NCCL give what one CPU process gives, in float64: every stage, with microbatches and clipping."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from colossal_comm import join, leave
from colossal_core.collectives import SingleProcess
from colossal_core.mesh import MeshLayout
from colossal_core.testing import RunRecord, RunSpec, compare, record_run, table
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.parity import oracle_of

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


def rank_of(rank: int, stage: int, folder: str) -> None:
    """One rank: its record goes into a file."""
    mesh = MeshLayout((1, 1, NUM_RANKS, 1, 1))
    address = f"file://{folder}/store-{stage}"
    collectives = join(mesh, rank, torch.device("cuda", rank), address, timedelta(seconds=120))
    torch.save(record_run(spec_of(stage), collectives), f"{folder}/record-{stage}-{rank}.pt")
    leave(collectives)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_gpus_are_one_process(stage: int, tmp_path: Path) -> None:
    assert torch.accelerator.device_count() >= NUM_RANKS
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_of, args=(rank, stage, str(tmp_path))) for rank in range(NUM_RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    assert [process.exitcode for process in ranks] == [0, 0]
    records: list[RunRecord] = [
        torch.load(tmp_path / f"record-{stage}-{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)
    ]
    rows = compare(records, record_run(oracle_of(spec_of(stage)), SingleProcess(torch.device("cpu"))))
    assert all(row.passed for row in rows), table(rows)
