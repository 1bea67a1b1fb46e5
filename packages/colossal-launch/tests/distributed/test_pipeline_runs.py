"""`colossal train` over pipeline stages: the losses of one process, going on under another schedule, and a stage that hangs."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("colossal_zero")
pytest.importorskip("colossal_pipeline")

Start = Callable[..., "subprocess.Popen[str]"]
SETTINGS = (
    "model.example_batch=tiny_model:batch",
    "precision=fp64",
    "scheduler.name=constant",
    "batch.micro_size=2",
    "train.eval_every_steps=2",
    "checkpoint.every_steps=2",
)


def words(run: str, *settings: str, processes: int = 2) -> tuple[str, ...]:
    chosen = (*SETTINGS, f"checkpoint.directory=runs/{run}", *settings)
    return (
        "train",
        "run.yaml",
        "--processes",
        str(processes),
        *(word for text in chosen for word in ("--set", text)),
    )


def losses(folder: Path) -> list[float]:
    """Of training and of held-out text, in the order of their steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in ("loss", "val_loss") if key in line]


def test_stages_train_as_one_process_does(colossal: Start, project: Path) -> None:
    """Four steps: two under 1F1B, and from the checkpoint two under ZB-H1. Dropout draws what it draws in one process."""

    def run(*given: str) -> None:
        running = colossal(*given)
        _, errors = running.communicate(timeout=250)
        assert running.returncode == 0, errors

    run(*words("alone", "train.num_steps=4", processes=1))
    run(*words("stages", "train.num_steps=2", "parallel.pipeline.size=2"))
    run(*words("stages", "train.num_steps=4", "parallel.pipeline={size: 2, schedule: zb-h1}"))
    alone, stages = losses(project / "runs/alone"), losses(project / "runs/stages")
    assert len(alone) == 6
    assert stages == pytest.approx(alone, rel=1e-12, abs=0.0)


def test_a_stage_that_hangs_is_named(
    colossal: Start, steps_written: Callable[..., int], left_behind: Callable[[], list[int]]
) -> None:
    hanging = ("model.config.how=hang", "model.config.rank=1", "parallel.pipeline.size=2", "train.timeout_seconds=10")
    running = colossal(*words("a", *hanging, "batch.micro_size=8"))
    steps_written(2)
    started = time.monotonic()
    _, errors = running.communicate(timeout=200)
    assert time.monotonic() - started < 60
    assert running.returncode == 1
    assert (
        "rank 0, which holds stage 0 of the pipeline, was waiting for the gradients of microbatch 0 in front of B0.0"
        in errors
    )
    assert left_behind() == []
