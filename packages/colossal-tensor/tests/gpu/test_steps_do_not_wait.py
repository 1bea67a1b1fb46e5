"""On two GPUs no step under tensor parallelism makes the host wait for the device: torch's own check of synchronisation is on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.collectives import Collectives
from colossal_core.testing import RunSpec, WorkerPool
from colossal_core.testing.each import failures_of_each
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.parity import start
from colossal_core.testing.waiting import losses_without_waiting

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers", reason="this is a model of transformers")
pytest.importorskip("colossal_zero")

NUM_RANKS = 2
VOCABULARY, SEQUENCE_LENGTH = 256, 64
TENSORS: tuple[dict[str, Any], ...] = ({}, {"overlap": "plain"}, {"sequence_parallel": False})
CASES: tuple[dict[str, Any], ...] = (
    *({"parallel": {"tensor": {"size": NUM_RANKS, **tensor}}} for tensor in TENSORS),
    *({"parallel": {"tensor": {"size": NUM_RANKS}, "zero": {"stage": stage}}} for stage in (1, 3)),
    {"parallel": {"tensor": {"size": NUM_RANKS}}, "compile": {"enabled": True}},
)


def small_llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQUENCE_LENGTH,
    )
    model: Any = transformers.LlamaForCausalLM
    built: nn.Module = model(config)
    return built.train()


def unpadded(step: int, num_sequences: int) -> dict[str, torch.Tensor]:
    """Sequences without a mask: where a batch brings one, a model of transformers asks the device whether any of it is padding."""
    batch = TokenBatches(VOCABULARY, SEQUENCE_LENGTH)(step, num_sequences)
    return {name: value for name, value in batch.items() if name != "attention_mask"}


def train(collectives: Collectives, case: dict[str, Any]) -> None:
    """Some steps with two microbatches and clipping, in which nothing must wait."""
    config = {
        "batch": {"global_size": 4, "micro_size": 2},
        "precision": "bf16",
        "optimizer": {"max_grad_norm": 0.1},
        **case,
    }
    spec = RunSpec(config, small_llama, unpadded, num_steps=4, task="causal-lm")
    losses_without_waiting(start(spec, collectives), spec)


@pytest.mark.timeout(300)
def test_no_step_waits_for_the_device(gpus: WorkerPool) -> None:
    if torch.accelerator.device_count() < NUM_RANKS:
        pytest.skip(f"needs {NUM_RANKS} GPUs")
    for waited in gpus.run(NUM_RANKS, failures_of_each, train, {str(case): case for case in CASES}):
        assert not waited, "\n".join(f"{name}\n{text}" for name, text in waited.items())
