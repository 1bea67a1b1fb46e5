"""SIGKILL at any moment: what is found afterwards is complete and is what was saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, pathlib, random, signal, sys, time
import torch
from colossal_core.checkpoint import find_latest, read_full, save
from colossal_core.collectives import SingleProcess
from colossal_core.layout import Placement
from colossal_core.strategy import RegisteredTensor

torch.set_num_threads(1)
directory = pathlib.Path(sys.argv[1])
alone = SingleProcess(torch.device("cpu"))
names = [f"layers.{index}.weight" for index in range(20)]


def value(step, index):
    return torch.arange(64.0).reshape(8, 8) + 100.0 * step + index


def train(first):
    for step in range(first, first + 10000):
        tensors = [RegisteredTensor("parameter", name, value(step, i), Placement((8, 8))) for i, name in enumerate(names)]
        save(directory, step, tensors, {"step": step}, alone, keep=2)


random.seed(0)
step, restarts_with_leftovers = 0, 0
for attempt in range(15):
    child = os.fork()
    if child == 0:
        # Every second run saves the step that is already there once more.
        train(step if attempt % 2 else step + 1)
    while find_latest(directory, alone) is None:
        time.sleep(0.005)
    time.sleep(random.uniform(0.0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    restarts_with_leftovers += any(path.suffix == ".tmp" for path in directory.iterdir())
    found = find_latest(directory, alone)
    assert found is not None and not found.skipped, found
    assert found.step >= step, (found.step, step)
    step = found.step
    assert found.manifest.metadata == {"step": step}
    for index, name in enumerate(names):
        assert torch.equal(read_full(found.path, "parameter", name), value(step, index))
print("leftovers", restarts_with_leftovers)
"""


def test_killed_at_random_moments(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    word, count = done.stdout.split()
    assert word == "leftovers"
    assert int(count) > 0, "no run was killed while it wrote, so nothing was tried"
