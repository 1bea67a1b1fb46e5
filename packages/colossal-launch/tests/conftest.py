"""A small project in a temporary folder, and the `colossal` command run in it as a user runs it: as a process that may be killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

MODEL = '''
"""A small language model with dropout, and ways to break it."""

import os
import signal
import time

import torch
from torch import nn
from torch.nn import functional


class Tiny(nn.Module):
    def __init__(self, how="", rank=0, seconds=0.0, dropout=0.1):
        super().__init__()
        self.how, self.rank, self.seconds, self.calls = how, rank, seconds, 0
        self.embed = nn.Embedding(257, 32)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(dropout)) for _ in range(2))
        self.head = nn.Linear(32, 257)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        self.calls += self.training
        here = self.training and int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")) == self.rank
        time.sleep(self.seconds if self.training else 0.0)
        if self.calls == 3 and here:
            if self.how == "raise":
                raise ValueError("three calls are enough")
            if self.how == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.54 GiB.")
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "leave":
                os._exit(7)
            if self.how == "hang":
                time.sleep(1000)
            if self.how == "nan":
                x = x * float("nan")
        return self.head(x)


def build(**config):
    return Tiny(**config)


def loss(outputs, batch):
    labels = batch["labels"][:, 1:].reshape(-1)
    logits = outputs[:, :-1].reshape(labels.numel(), -1)
    return functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100), (labels != -100).sum()


def batch(num_sequences):
    return {"input_ids": torch.randint(0, 257, (num_sequences, 32))}
'''

CONFIG = """
model: {factory: "tiny_model:build", loss: "tiny_model:loss"}
data: {source: text.txt, sequence_length: 32, tokenizer: bytes}
batch: {global_size: 8}
optimizer: {lr: 1.0e-2}
train: {num_steps: 5, eval_num_batches: 1, seed: 1, device: cpu}
checkpoint: {directory: runs/a}
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `run.yaml`, `text.txt` and `tiny_model.py`, which is the current one."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "seven",
        "wizards",
        "brew",
        "strange",
        "potions",
    ]
    generator = random.Random(0)
    lines = (" ".join(generator.choice(words) for _ in range(12)) for _ in range(300))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    (tmp_path / "tiny_model.py").write_text(MODEL)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A word in the environment of everything that a test starts. What is left of it at the end is killed."""
    word = f"colossal-test-{uuid.uuid4().hex}"
    monkeypatch.setenv("COLOSSAL_TEST_MARK", word)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield word
    for pid in _marked(word):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _marked(word: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with suppress(OSError):
                if word.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
    return found


@pytest.fixture
def processes(mark: str) -> Callable[[], list[int]]:
    """The processes that the test has started, by their environment: children of children too."""
    return lambda: _marked(mark)


@pytest.fixture
def left_behind(mark: str) -> Callable[[], list[int]]:
    """The processes that are still there one second after everything should have ended."""

    def look() -> list[int]:
        end = time.monotonic() + 1
        while (found := _marked(mark)) and time.monotonic() < end:
            time.sleep(0.05)
        return found

    return look


@pytest.fixture
def colossal(project: Path, mark: str) -> Iterator[Start]:
    """Starts `colossal` with these words in the project, in a process group of its own, as a terminal does, and with Ctrl-C not ignored,
    which whoever runs the tests in the background would pass on.
    """
    started: list[subprocess.Popen[str]] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(*words: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "colossal_launch", *words],
            cwd=project,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        started.append(process)
        return process

    yield start
    signal.signal(signal.SIGINT, before)
    for pid in _marked(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in started:
        process.communicate()


@pytest.fixture
def steps_written(project: Path) -> Callable[..., int]:
    """Waits until `metrics.jsonl` of a run holds that many lines, and returns how many it holds then."""

    def wait(count: int, run: str = "runs/a", seconds: float = 200.0) -> int:
        path, end = project / run / "metrics.jsonl", time.monotonic() + seconds
        while time.monotonic() < end:
            lines = path.read_text().count("\n") if path.is_file() else 0
            if lines >= count:
                return lines
            time.sleep(0.005)
        raise TimeoutError(f"{path} did not reach {count} lines")

    return wait
