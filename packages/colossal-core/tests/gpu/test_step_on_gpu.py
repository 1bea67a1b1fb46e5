"""On a GPU the host runs ahead of a step: torch's own check of synchronisation is on from the batch to the result."""

from __future__ import annotations

import pytest
import torch

from colossal_core.collectives import SingleProcess
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TinyModel, TokenBatches
from colossal_core.testing.parity import share_of_step, start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1], ids=["not clipped", "clipped"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_never_waits_for_the_device(precision: str, max_grad_norm: float | None, name: str) -> None:
    """The batch comes from memory that is not pinned. The first step makes what is made once."""
    config = {
        "batch": {"global_size": 4, "micro_size": 2},
        "precision": precision,
        "optimizer": {"name": name, "max_grad_norm": max_grad_norm},
    }
    spec = RunSpec(config, TinyModel(), TokenBatches(), task="causal-lm", plugins="")
    trained = start(spec, SingleProcess(torch.device("cuda", 0)))
    shares = [share_of_step(spec, trained.plan, 0, step) for step in range(3)]
    trained.train_step(shares[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [trained.train_step(share) for share in shares[1:]]
        statistics = trained.gradient_statistics()
        counted = trained.skipped_steps
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(result.loss) for result in results)
    assert int(counted) >= 0
    torch.testing.assert_close(statistics["*"].norm, results[-1].grad_norm)
