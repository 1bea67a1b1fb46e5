"""On two GPUs no step of a pipeline makes the host wait for the device, recorded or not: torch's own check of synchronisation is on."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.collectives import Collectives
from colossal_core.stage_links import FIRST_STEPS
from colossal_core.testing import RunSpec, WorkerPool
from colossal_core.testing.each import failures_of_each
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.parity import start
from colossal_core.testing.waiting import losses_without_waiting
from colossal_pipeline.recorder import StepRecorder

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers", reason="this is a model of transformers")
pytest.importorskip("colossal_zero")

NUM_RANKS = 2
VOCABULARY, SEQUENCE_LENGTH = 256, 64
SCHEDULES = ("1f1b", "interleaved", "zb-h1", "zbv")


def pipeline(schedule: str, **parallel: Any) -> dict[str, Any]:
    return {"parallel": {"pipeline": {"size": NUM_RANKS, "schedule": schedule}, **parallel}}


CASES: tuple[dict[str, Any], ...] = (
    *map(pipeline, SCHEDULES),
    *(pipeline(schedule, zero={"stage": stage}) for schedule in ("1f1b", "zbv") for stage in (1, 3)),
    *({**pipeline(schedule), "compile": {"enabled": True}} for schedule in ("1f1b", "zbv")),
    {**pipeline("zb-h1"), "recompute": {"mode": "full"}},
)


def small_llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
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
    """Some steps with four microbatches and clipping, in which nothing must wait, the last one recorded. The first steps, which make what
    is made once and send through host memory, are not watched.
    """
    config = {
        "batch": {"global_size": 4, "micro_size": 1},
        "precision": "bf16",
        "optimizer": {"max_grad_norm": 0.1},
        **case,
    }
    spec = RunSpec(config, small_llama, unpadded, num_steps=4, task="causal-lm", plugins="comm,pipeline,zero")
    trained, recorder = start(spec, collectives), StepRecorder(collectives.device)
    losses_without_waiting(trained, spec, FIRST_STEPS, recorder)
    spans, stage = recorder.spans(), trained._engine.context.coordinate["pp"]
    assert tuple(span.action for span in spans) == trained.plan.program.actions[stage]
    assert all(one.start <= one.end <= other.start for one, other in pairwise(spans)), f"{spans}"


@pytest.mark.timeout(300)
def test_no_step_waits_for_the_device(gpus: WorkerPool) -> None:
    if torch.accelerator.device_count() < NUM_RANKS:
        pytest.skip(f"needs {NUM_RANKS} GPUs")
    for waited in gpus.run(NUM_RANKS, failures_of_each, train, {str(case): case for case in CASES}):
        assert not waited, "\n".join(f"{name}\n{text}" for name, text in waited.items())
