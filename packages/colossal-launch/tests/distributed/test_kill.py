"""A run that is killed and started again gives, bit for bit, the losses of one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("colossal_zero")

Start = Callable[..., "subprocess.Popen[str]"]
NUM_STEPS = 60
SETTINGS = (
    f"train.num_steps={NUM_STEPS}",
    "checkpoint.every_steps=4",
    "train.eval_every_steps=10",
    "model.config.seconds=0.03",
)


def measured(run: Path) -> list[dict[str, object]]:
    """The lines of metrics without times and sizes."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "num_tokens", "skipped", "val_loss", "val_bits_per_byte")
    return [{name: line[name] for name in kept if name in line} for line in lines]


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-????????"))


def test_killed_at_random_moments_the_run_goes_on_with_the_same_losses(
    project: Path,
    colossal: Start,
    steps_written: Callable[..., int],
    processes: Callable[[], list[int]],
    left_behind: Callable[[], list[int]],
) -> None:
    """Dropout is on. The whole tree is killed once, the launcher alone once, one rank once, and then a bit is flipped."""
    generator = random.Random()
    seed = generator.randrange(2**32)
    generator.seed(seed)

    def started(run: str) -> subprocess.Popen[str]:
        settings = (*SETTINGS, f"checkpoint.directory=runs/{run}")
        return colossal(
            "train", "run.yaml", "--processes", "2", *(word for text in settings for word in ("--set", text))
        )

    reference = started("never-killed")
    killed = project / "runs" / "killed"
    num_lines = 0
    for victim in ("tree", "launcher", "rank"):
        running = started("killed")
        num_lines = steps_written(num_lines + generator.randrange(6, 12), "runs/killed")
        time.sleep(generator.random() * 0.1)
        workers = [pid for pid in processes() if _parent(pid) == running.pid]
        rank = generator.choice(workers)
        for pid in {"tree": [running.pid, *workers], "launcher": [running.pid], "rank": [rank]}[victim]:
            os.kill(pid, signal.SIGKILL)
        output, errors = running.communicate(timeout=200)
        if victim == "rank":
            assert running.returncode == 1, (seed, output, errors)
            number = next(n for n in (0, 1) if f"error: rank {n} (pid {rank}) died of signal 9 (SIGKILL)" in errors)
            assert errors == (
                f"error: rank {number} (pid {rank}) died of signal 9 (SIGKILL): the system may have been out of memory\n"
                f"       rank {1 - number} failed after it\n"
            )
        else:
            assert running.returncode == -signal.SIGKILL
            assert errors == "", (seed, errors)
    assert reference.wait(timeout=200) == 0, reference.communicate()
    newest = newest_checkpoint(killed)
    assert int(newest.name.split("-")[1]) < NUM_STEPS
    data = sorted(newest.glob("*.safetensors"))[0]
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    last = started("killed")
    output, errors = last.communicate(timeout=200)
    assert last.returncode == 0, (seed, output, errors)
    assert errors == "", errors
    step = int(newest.name.split("-")[1])
    assert f"going on from step {step - 4} " in output, output
    assert f"{newest.name}/{data.name}" in output or (newest.name in output and data.name in output), output
    assert measured(killed) == measured(project / "runs" / "never-killed"), seed
    assert [line["step"] for line in measured(killed) if "loss" in line] == list(range(1, NUM_STEPS + 1))
    assert left_behind() == []


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1
