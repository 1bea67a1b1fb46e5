"""What a save takes of the device's memory beside what training holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from colossal_core.checkpoint.write import CHUNK_BYTES
from colossal_core.collectives import SingleProcess
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.parity import share_of_step, start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIONS = TinyOptions(hidden_size=768, num_heads=4, num_blocks=4, dropout=0.0)
"""76 MB of masters, the largest of 7 MB."""


def spec_of(stage: int, optimizer: dict[str, Any]) -> RunSpec:
    config = {
        "batch": {"global_size": 2, "micro_size": 2},
        "precision": "bf16",
        "optimizer": optimizer,
        "parallel": {"zero": {"stage": stage}},
    }
    return RunSpec(config, TinyModel(OPTIONS), TokenBatches(), task="causal-lm")


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
def test_a_save_copies_nothing_on_the_device(states: str, stage: int, tmp_path: Path, record_property: Any) -> None:
    """Masters and moments go to the host as they lie, in chunks. 8-bit moments are saved as float32, and are decoded one by one."""
    spec = spec_of(stage, {"states": states})
    trained = start(spec, SingleProcess(torch.device("cuda", 0)))
    trained.train_step(share_of_step(spec, trained.plan, 0, 0))
    sizes = [shard.master.nbytes for shard in trained._engine.state.shards.values()]
    own, allowed = sum(sizes), 5 * max(sizes) if states == "int8" else 2 * 2**20
    assert own > CHUNK_BYTES
    trained._engine.state.wait_published()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trained.save(tmp_path)
    made = torch.cuda.max_memory_allocated() - before
    record_property("made_over_masters", made / own)
    assert made <= allowed, f"{made / 2**20:.1f} MiB for masters of {own / 2**20:.1f} MiB"
