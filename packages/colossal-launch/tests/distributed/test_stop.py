"""Ctrl-C and SIGTERM: a checkpoint of the step at which all ranks stopped, the exit status of the signal, and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Start = Callable[..., "subprocess.Popen[str]"]
SLOW = ("--set", "train.num_steps=1000", "--set", "model.config.seconds=0.02")


def last_step(run: Path) -> int:
    return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_signal_saves_and_leaves(
    num_processes: int,
    project: Path,
    colossal: Start,
    steps_written: Callable[..., int],
    left_behind: Callable[[], list[int]],
) -> None:
    """Ctrl-C, which a terminal sends to the whole foreground group; then the run goes on, and SIGTERM to the command alone ends it."""
    if num_processes > 1:
        pytest.importorskip("colossal_zero")
    run = project / "runs/a"
    num_lines = saved = 0
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        running = colossal("train", "run.yaml", "--processes", str(num_processes), *SLOW)
        num_lines = steps_written(num_lines + 5)
        if number is signal.SIGINT:
            os.killpg(running.pid, number)
        else:
            running.send_signal(number)
        output, errors = running.communicate(timeout=200)
        step = last_step(run)
        assert (running.returncode, errors) == (status, ""), output
        assert output.splitlines()[-2:] == [
            f"step {step}: saved runs/a/checkpoints/step-{step:08d}",
            f"stopped at step {step}; start the same command again to go on",
        ]
        if saved:
            assert f"going on from step {saved} (runs/a/checkpoints/step-{saved:08d})\n" in output
        saved = step
        assert left_behind() == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_second_signal_ends_at_once(
    num_processes: int,
    project: Path,
    colossal: Start,
    steps_written: Callable[..., int],
    left_behind: Callable[[], list[int]],
) -> None:
    """The last rank hangs in its third step, so the first signal cannot be followed."""
    if num_processes > 1:
        pytest.importorskip("colossal_zero")
    words = ("--set", "model.config.how=hang", "--set", f"model.config.rank={num_processes - 1}")
    running = colossal("train", "run.yaml", "--processes", str(num_processes), *SLOW, *words)
    steps_written(2)
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(timeout=1.5)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
    assert running.communicate()[1] == ""
    assert left_behind() == []
    assert not (project / "runs/a/checkpoints").exists()


def test_a_signal_before_the_first_step_leaves_without_a_word(
    colossal: Start, processes: Callable[[], list[int]], left_behind: Callable[[], list[int]]
) -> None:
    """While the workers import what they need, they have nothing to save."""
    pytest.importorskip("colossal_zero")
    running = colossal("train", "run.yaml", "--processes", "2")
    while len(processes()) < 3:
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=200)
    assert (running.returncode, errors) == (143, "")
    assert left_behind() == []
