"""Starts the ranks, listens to them, and starts them again for the rows that are left when one has failed, hung, or run out of memory.

All rows share one set of processes as long as nothing goes wrong, so starting, NCCL and the cache of compiled kernels are paid once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from beside_peers.rows import Row
from beside_peers.worker import RESTART, Task, launch_arguments

GRACE_SECONDS = 2.0
START_SECONDS = 150.0


@dataclass(frozen=True)
class Limits:
    """total_seconds: of everything, so that a lent machine's call always returns a table. row_seconds: of one row, compilation included."""

    total_seconds: float
    row_seconds: float


@dataclass
class Outcome:
    """What one set of processes left: results by index of its rows, and how it ended. failed: index and details of the row that broke."""

    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed: tuple[int, dict[str, Any]] | None = None
    ran_out: bool = False


class Supervisor:
    """Runs all rows of a task. script: called with `launch_arguments` for every rank. report: told of each row, its result, the machine."""

    def __init__(
        self,
        script: Path,
        processes: int,
        limits: Limits,
        log: Path,
        report: Callable[[Row, dict[str, Any], Mapping[str, Any]], None],
    ) -> None:
        self._script, self._processes, self._limits = script, processes, limits
        self._log, self._report = log, report
        self._deadline = time.monotonic() + limits.total_seconds
        self._machine: dict[str, Any] = {}

    def run(self, task: Task) -> None:
        pending = list(task.rows)
        while pending:
            if time.monotonic() > self._deadline - 5:
                self._give_up(pending, "no time left")
                return
            outcome = self._run_set(replace(task, rows=tuple(pending)))
            done = set(outcome.results)
            if outcome.failed is not None:
                index, details = outcome.failed
                done.add(index)
                self._report(pending[index], details, self._machine)
                if details["failed"] == "out of memory":
                    done |= self._too_large(pending, index, done)
            pending = [row for index, row in enumerate(pending) if index not in done]
            if outcome.ran_out:
                self._give_up(pending, "no time left")
                return

    def _too_large(self, rows: list[Row], index: int, done: set[int]) -> set[int]:
        """The rows that cannot fit either: the same contestant at a larger micro-batch."""
        broken = rows[index]
        found = set()
        for other, row in enumerate(rows):
            same = replace(row, micro_batch=broken.micro_batch) == broken
            if other not in done and same and row.micro_batch > broken.micro_batch:
                found.add(other)
                details = {"failed": "out of memory", "message": f"already at micro-batch {broken.micro_batch}"}
                self._report(row, details, self._machine)
        return found

    def _give_up(self, rows: list[Row], reason: str) -> None:
        for row in rows:
            self._report(row, {"failed": reason, "message": ""}, self._machine)

    def _run_set(self, task: Task) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            task = replace(task, events=str(Path(folder) / "events.jsonl"))
            with self._workers(task) as workers:
                return self._watch(task, workers)

    @contextmanager
    def _workers(self, task: Task) -> Iterator[list[subprocess.Popen[bytes]]]:
        """One process a rank, ended in any case."""
        workers: list[subprocess.Popen[bytes]] = []
        with self._log.open("ab") as log, _terminated_as_exit():
            try:
                port = _free_port()
                for rank in range(self._processes):
                    command = [sys.executable, "-u", str(self._script), *launch_arguments(task)]
                    environment = _environment(rank, self._processes, port)
                    workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
                yield workers
            finally:
                for worker in workers:
                    worker.kill()
                for worker in workers:
                    worker.wait()

    def _watch(self, task: Task, workers: list[subprocess.Popen[bytes]]) -> Outcome:
        outcome = Outcome()
        current: int | None = None
        row_limit = time.monotonic() + START_SECONDS
        failures: list[dict[str, Any]] = []
        seen = 0
        while True:
            ended = [status for worker in workers if (status := worker.poll()) is not None]
            events = _read_events(Path(task.events))
            for event in events[seen:]:
                if event["event"] == "joined":
                    self._machine = event["machine"]
                elif event["event"] == "start":
                    current, row_limit = event["index"], time.monotonic() + self._limits.row_seconds
                elif event["event"] == "row":
                    outcome.results[event["index"]] = event["result"]
                    self._report(task.rows[event["index"]], event["result"], self._machine)
                    current, row_limit = None, time.monotonic() + START_SECONDS
                else:
                    failures.append(event)
            seen = len(events)
            if len(outcome.results) == len(task.rows):
                return outcome  # ranks that are slow to leave are ended, and waited for by nobody
            if failures or any(status not in (0, RESTART) for status in ended):
                outcome.failed = self._failure(task, workers, current, failures)
                return outcome
            if len(ended) == len(workers):
                return outcome
            now = time.monotonic()
            if now > self._deadline or now > row_limit:
                outcome.ran_out = now > self._deadline
                where = current if current is not None else self._next(outcome, task)
                reason = "no time left" if outcome.ran_out else "time limit"
                outcome.failed = (where, {"failed": reason, "message": ""})
                return outcome
            time.sleep(0.1)

    def _failure(
        self,
        task: Task,
        workers: list[subprocess.Popen[bytes]],
        current: int | None,
        failures: list[dict[str, Any]],
    ) -> tuple[int, dict[str, Any]]:
        """What broke the set. Waits a little for the other ranks' own words: memory that ran out is the cause, a lost peer is not."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
            time.sleep(0.1)
        told = [event for event in _read_events(Path(task.events)) if event["event"] == "failed"] or failures
        if not told:
            statuses = [worker.poll() for worker in workers]
            index = current if current is not None else 0
            return index, {"failed": "a rank ended", "message": f"exit statuses {statuses}"}
        cause = next((event for event in told if event["kind"] == "out of memory"), told[0])
        index = current if current is not None else cause["index"]
        return index, {
            "failed": cause["kind"],
            "message": cause["message"],
            "traceback": cause["traceback"],
            "failed_ranks": sorted(event["rank"] for event in told),
        }

    @staticmethod
    def _next(outcome: Outcome, task: Task) -> int:
        return next(index for index in range(len(task.rows)) if index not in outcome.results)


def _read_events(path: Path) -> list[dict[str, Any]]:
    """All whole lines so far."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """torchrun's variables, and settings that save time: what the caller has set himself stays."""
    defaults = {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "8",
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / "colossal-inductor"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    ranks = {
        "RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return {**defaults, **os.environ, **{key: str(value) for key, value in ranks.items()}}


def _free_port() -> int:
    """One below those that the kernel gives to connections (from 32768 on), any of which could take it before the ranks listen on it."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """SIGTERM (from `timeout`) becomes SystemExit, so that the ranks are ended on the way out."""

    def stop(signum: int, frame: FrameType | None) -> None:
        del frame
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
