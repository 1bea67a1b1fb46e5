"""A rank that fails: one readable message about the first one, exit status 1, and the others ended promptly."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable

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
    _, errors = running.communicate(timeout=60)
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
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 1
    assert errors == (
        "error: step 3: the loss is nan: the update was left out and the run ends here (train.non_finite: stop); "
        "lower optimizer.lr, or set train.non_finite: skip to go on\n"
    )
    assert left_behind() == []


def test_a_rank_that_hangs_is_not_waited_for_longer_than_the_timeout(
    colossal: Start, steps_written: Callable[..., int], left_behind: Callable[[], list[int]]
) -> None:
    running = colossal(*words("hang", "--set", "train.timeout_seconds=2"))
    steps_written(2)
    started = time.monotonic()
    _, errors = running.communicate(timeout=60)
    assert time.monotonic() - started < 15
    assert running.returncode == 1
    assert errors.count("\n") == 1, errors
    assert "failed on rank 0 after" in errors, errors
    assert left_behind() == []
