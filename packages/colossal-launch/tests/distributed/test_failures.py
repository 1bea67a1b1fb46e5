"""A rank that fails: one readable message about the first one, exit status 1, and the others ended promptly."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("colossal_zero")

Start = Callable[..., "subprocess.Popen[str]"]


def words(how: str, *more: str) -> tuple[str, ...]:
    settings = (f"model.config.how={how}", "model.config.rank=1")
    return ("train", "run.yaml", "--processes", "2", *(w for text in settings for w in ("--set", text)), *more)


def test_the_traceback_of_the_first_rank_that_failed_comes_first(
    colossal: Start, left_behind: Callable[[], list[int]]
) -> None:
    running = colossal(*words("raise", "--debug"))
    _, errors = running.communicate(timeout=200)
    assert running.returncode == 1
    assert errors.startswith("Traceback (most recent call last):\n"), errors
    assert errors.count("Traceback") == 1, errors
    assert re.sub(r"pid \d+", "pid N", errors).endswith(
        "ValueError: three calls are enough\n"
        "error: rank 1 (pid N) failed first: ValueError: three calls are enough (tiny_model.py, line 30)\n"
        "       rank 0 failed after it\n"
    ), errors
    assert left_behind() == []


def test_a_loss_that_is_not_a_number_ends_the_run(colossal: Start, left_behind: Callable[[], list[int]]) -> None:
    running = colossal(*words("nan"))
    _, errors = running.communicate(timeout=200)
    assert running.returncode == 1
    assert errors == (
        "error: step 3: the loss is nan: the update was left out and the run ends here (train.non_finite: stop); "
        "the gradients of embed, layers.0, layers.1, head are not finite; "
        "lower optimizer.lr, or set train.non_finite: skip to go on\n"
    )
    assert left_behind() == []


def test_a_loss_on_one_rank_that_is_not_a_number_ends_every_rank(colossal: Start, tmp_path: Path) -> None:
    """Rank 1 alone has it. The ranks are processes of their own here, as under Slurm: each one says which step, and ends with status 1."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(one.getsockname()[1])}
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "localhost", **address}
    settings = ("model.config.how=nan", "model.config.rank=1", "train.log_every_steps=5")

    def ranks(*more: str) -> list[tuple[int, str]]:
        words = ("train", "run.yaml", *(word for text in (*settings, *more) for word in ("--set", text)))
        started = [
            colossal(*words, environment={**slurm, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in ("0", "1")
        ]
        errors = [running.communicate(timeout=200)[1] for running in started]
        return [(running.returncode, text) for running, text in zip(started, errors, strict=True)]

    for rank, (status, errors) in enumerate(ranks()):
        assert status == 1, errors
        assert errors == (
            f"error on rank {rank}: step 3: the loss is nan: the update was left out and the run ends here (train.non_finite: stop); "
            "lower optimizer.lr, or set train.non_finite: skip to go on\n"
        )
    assert ranks("train.non_finite=skip", "checkpoint.directory=runs/b") == [(0, ""), (0, "")]
    lines = [json.loads(line) for line in (tmp_path / "runs/b/metrics.jsonl").read_text().splitlines()]
    assert [(line["skipped"], line["skipped_steps"]) for line in lines if "loss" in line] == [(False, 1)]


def test_a_rank_that_hangs_is_not_waited_for_longer_than_the_timeout(
    colossal: Start, steps_written: Callable[..., int], left_behind: Callable[[], list[int]]
) -> None:
    running = colossal(*words("hang", "--set", "train.timeout_seconds=10"))
    steps_written(2)
    started = time.monotonic()
    _, errors = running.communicate(timeout=200)
    assert time.monotonic() - started < 60
    assert running.returncode == 1
    assert errors.count("\n") == 1, errors
    assert "failed on rank 0 after" in errors, errors
    assert left_behind() == []
