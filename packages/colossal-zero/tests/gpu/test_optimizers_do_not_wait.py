"""On a GPU no optimizer, precision or stage makes the host wait for the device: torch's own check of synchronisation is on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colossal_core.collectives import Collectives, SingleProcess
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TinyModel, TokenBatches
from colossal_core.testing.parity import share_of_step, start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_STEPS = 4
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(("adamw", precision, {}) for precision in ("fp16", "fp32", "bf16")),
    ("adamw", "bf16", {"states": "bf16"}),
    ("adamw", "bf16", {"states": "int8"}),
    ("adamw", "bf16", {"masters": "compute", "states": "bf16"}),
    ("lion", "bf16", {"states": "int8"}),
    *((name, "bf16", {}) for name in ("sgd", "lion", "lamb", "lars", "adafactor", "muon")),
]
"""(optimizer, precision, keys of the section `optimizer`)."""


def steps(collectives: Collectives, optimizer: dict[str, Any], precision: str, stage: int) -> list[torch.Tensor]:
    """Losses of some steps with two microbatches and clipping. The first step, which makes what is made once, is not watched."""
    config = {
        "batch": {"global_size": 4, "micro_size": 2},
        "precision": precision,
        "optimizer": {"max_grad_norm": 0.1, **optimizer},
        "parallel": {"zero": {"stage": stage, "bucket_bytes": 9000}},
    }
    spec = RunSpec(config, TinyModel(), TokenBatches(), task="causal-lm")
    trained = start(spec, collectives)
    shares = [share_of_step(spec, trained.plan, 0, step) for step in range(1 + NUM_STEPS)]
    trained.train_step(shares[0])
    mode = "error" if collectives.device.type == "cuda" else "default"
    if mode == "error":
        torch.cuda.set_sync_debug_mode(mode)
    try:
        return [trained.train_step(share).loss for share in shares[1:]]
    finally:
        if mode == "error":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("name", "precision", "keys"), CASES)
def test_no_step_waits_for_the_device(name: str, precision: str, keys: dict[str, Any], stage: int) -> None:
    losses = steps(SingleProcess(torch.device("cuda", 0)), {"name": name, **keys}, precision, stage)
    assert all(bool(torch.isfinite(loss)) for loss in losses)
