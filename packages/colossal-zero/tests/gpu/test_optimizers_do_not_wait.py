"""On a GPU no optimizer, precision or stage makes the host wait for the device: torch's own check of synchronisation is on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from colossal_core.collectives import SingleProcess
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TinyModel, TokenBatches
from colossal_core.testing.parity import start
from colossal_core.testing.waiting import losses_without_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(("adamw", precision, {}) for precision in ("fp16", "fp32", "bf16")),
    ("adamw", "bf16", {"states": "bf16"}),
    ("adamw", "bf16", {"states": "int8"}),
    ("adamw", "bf16", {"masters": "compute", "states": "bf16"}),
    ("lion", "bf16", {"states": "int8"}),
    *((name, "bf16", {}) for name in ("sgd", "lion", "lamb", "lars", "adafactor", "muon")),
]
"""(optimizer, precision, keys of the section `optimizer`)."""


def spec_of(optimizer: dict[str, Any], precision: str, stage: int) -> RunSpec:
    """Two microbatches and clipping."""
    config = {
        "batch": {"global_size": 4, "micro_size": 2},
        "precision": precision,
        "optimizer": {"max_grad_norm": 0.1, **optimizer},
        "parallel": {"zero": {"stage": stage, "bucket_bytes": 9000}},
    }
    return RunSpec(config, TinyModel(), TokenBatches(), num_steps=4, task="causal-lm")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("name", "precision", "keys"), CASES)
def test_no_step_waits_for_the_device(name: str, precision: str, keys: dict[str, Any], stage: int) -> None:
    spec = spec_of({"name": name, **keys}, precision, stage)
    trained = start(spec, SingleProcess(torch.device("cuda", 0)))
    assert all(math.isfinite(loss) for loss in losses_without_waiting(trained, spec))
