"""On two GPUs no step of a pipeline makes the host wait for the device, recorded or not: torch's own check of synchronisation is on."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from colossal_comm import join, leave
from colossal_core.collectives import Collectives
from colossal_core.mesh import MeshLayout
from colossal_core.stage_links import FIRST_STEPS
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.parity import share_of_step, start
from colossal_pipeline.recorder import StepRecorder

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers", reason="this is a model of transformers")
pytest.importorskip("colossal_zero")

NUM_RANKS = 2
NUM_STEPS = 4
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


def losses(case: dict[str, Any], collectives: Collectives) -> list[float]:
    """Losses of some steps with four microbatches and clipping, the last one recorded. The first steps, which make what is made once and
    send through host memory, are not watched.
    """
    config = {
        "batch": {"global_size": 4, "micro_size": 1},
        "precision": "bf16",
        "optimizer": {"max_grad_norm": 0.1},
        **case,
    }
    spec = RunSpec(config, small_llama, unpadded, task="causal-lm", plugins="comm,pipeline,zero")
    trained = start(spec, collectives)
    shares = [share_of_step(spec, trained.plan, collectives.rank, step) for step in range(FIRST_STEPS + NUM_STEPS)]
    found = [trained.train_step(share).loss for share in shares[:FIRST_STEPS]]
    context = trained._engine.context
    recorder = StepRecorder(collectives.device)
    watched = collectives.device.type == "cuda"
    if watched:
        torch.cuda.set_sync_debug_mode("error")
    try:
        found += [trained.train_step(share).loss for share in shares[FIRST_STEPS:-1]]
        context.recorder = recorder
        found.append(trained.train_step(shares[-1]).loss)
    finally:
        context.recorder = None
        if watched:
            torch.cuda.set_sync_debug_mode("default")
    spans = recorder.spans()
    assert tuple(span.action for span in spans) == trained.plan.program.actions[context.coordinate["pp"]]
    assert all(one.start <= one.end <= other.start for one, other in pairwise(spans)), f"{spans}"
    return [float(loss) for loss in found]


def rank_of(rank: int, cases: Sequence[dict[str, Any]], device_type: str, folder: str) -> None:
    """One rank: for every case its losses, or what waited, go into a file. What waits does so on every rank, so all go on."""
    torch.set_num_threads(1)
    device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, rank)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    mesh = MeshLayout((NUM_RANKS, 1, 1, 1, 1))
    collectives = join(mesh, rank, device, f"file://{folder}/store", timedelta(seconds=60))
    found: list[list[float] | str] = []
    for case in cases:
        torch.compiler.reset()
        try:
            found.append(losses(case, collectives))
        except (RuntimeError, AssertionError):
            found.append(traceback.format_exc())
        torch.save(found, f"{folder}/found-{rank}.pt")
    leave(collectives)


def watch(cases: Sequence[dict[str, Any]], device_type: str, folder: Path) -> list[list[list[float] | str]]:
    """What each rank found, case by case."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_of, args=(rank, cases, device_type, str(folder))) for rank in range(NUM_RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    for process in ranks:
        process.kill()
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(NUM_RANKS)]


@pytest.mark.timeout(300)
def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    if torch.accelerator.device_count() < NUM_RANKS:
        pytest.skip(f"needs {NUM_RANKS} GPUs")
    for found in watch(CASES, "cuda", tmp_path):
        waited = [f"{case}\n{text}" for case, text in zip(CASES, found, strict=False) if isinstance(text, str)]
        assert not waited, "\n".join(waited)
        assert len(found) == len(CASES), f"no end of {CASES[len(found)]}"
