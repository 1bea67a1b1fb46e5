"""`WorkerPool`: ranks for tests and for `colossal verify`, on the CPU or on GPUs, kept and reused. Those on the CPU are forked from a
server that has imported torch already.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import pickle
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Any, Self, TypeVar

from colossal_core.errors import ColossalError
from colossal_core.testing.worker import Failure, Job, work

T = TypeVar("T")

PRELOAD = ("torch", "torch.distributed", "torch._dynamo", "colossal_core.config", "colossal_core.testing.parity")
"""Imported once, by the server that ranks on the CPU are forked from. No tensor is made there: a fork after a parallel region would hang.
Nor does anything here ask for CUDA devices: what is forked from a process that has done so cannot use them.
"""

GRACE_SECONDS = 2.0
"""How long the other ranks may take, after one has failed, to say how they failed; then all are killed."""


class RankError(ColossalError):
    """A function failed on one or more ranks. The message is the first failing rank's traceback, then one line for each other rank."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple[type[RankError], tuple[str, int]]:
        return type(self), (str(self), self.rank)


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


class WorkerPool:
    """Worker processes with one thread each. Any world size up to what was ever asked for reuses the same processes.

    timeout_seconds: of one `run`, of joining and of every collective. device_type: `cpu`, or `cuda`: a rank's device is the GPU with its
    number, which is its current one before it joins. Such ranks start from nothing, for some seconds, and never have a CUDA that was begun
    in another process: the server of those on the CPU may also have been told to import transformers, which asks for the devices. torch's
    symmetric memory knows a group by its name for as long as a process lives, and each `run` makes groups of the same names: runs that use
    it want a pool each.

    Use it as a context manager, or call `close`; at the interpreter's exit, and when the parent is killed, the workers end too.
    """

    def __init__(self, timeout_seconds: float = 180.0, *, device_type: str = "cpu") -> None:
        self.timeout_seconds = timeout_seconds
        self.device_type = device_type
        self._context: ForkServerContext | SpawnContext = multiprocessing.get_context("spawn")
        if device_type == "cpu":
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(list(PRELOAD))
        self._workers: list[_Worker] = []
        self._folder = Path(tempfile.mkdtemp(prefix="colossal-pool-"))
        self._numbers = itertools.count()
        self._finalizer = weakref.finalize(self, _end, self._workers, self._folder)

    def run(self, world_size: int, function: Callable[..., T], *arguments: Any) -> list[T]:
        """Calls `function(collectives, *arguments)` on `world_size` ranks and returns the results in rank order.

        function: at module level; the arguments and results are pickled (between own processes of one session). The group of ranks is
        new for each call. One rank gets core's `SingleProcess`.

        Raises: what a rank raised, where it is a `ColossalError` with an exit status of its own (a wrong config), else RankError with the
        first failing rank's traceback; RankError too where ranks do not answer in time. All workers are then killed, and
        started anew by the next call.
        """
        assert world_size >= 1, world_size
        assert self._finalizer.alive, "the pool is closed"
        payload, modules = _pickled(function, arguments)
        store = self._folder / f"store-{next(self._numbers)}"
        job = Job(world_size, 0, str(store), self.timeout_seconds, modules, payload, self.device_type)
        self._start(world_size)
        chosen = self._workers[:world_size]
        for rank, worker in enumerate(chosen):
            worker.pipe.send_bytes(pickle.dumps(replace(job, rank=rank)))
        try:
            answers, failures = self._collect(chosen)
        except BaseException:  # a test's time limit, Ctrl-C: a late answer must not be taken for the next call's
            self._kill()
            raise
        finally:
            store.unlink(missing_ok=True)
        if failures or len(answers) < world_size:
            self._kill()
            _raise(failures, [rank for rank in range(world_size) if rank not in answers], self.timeout_seconds)
        return [answers[rank] for rank in range(world_size)]

    def _start(self, world_size: int) -> None:
        if any(not worker.process.is_alive() for worker in self._workers):
            self._kill()
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=work, args=(theirs,), daemon=True, name=f"colossal worker {len(self._workers)}"
            )
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def _collect(self, workers: Sequence[_Worker]) -> tuple[dict[int, Any], list[Failure]]:
        """Answers by rank, and failures. A worker that dies is a failure; after the first one the others have a short while."""
        rank_of = {worker.pipe: rank for rank, worker in enumerate(workers)}
        waiting = set(rank_of)
        answers: dict[int, Any] = {}
        failures: list[Failure] = []
        deadline = time.monotonic() + self.timeout_seconds
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                assert isinstance(pipe, Connection)
                waiting.discard(pipe)
                rank = rank_of[pipe]
                try:
                    answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    workers[rank].process.join(1.0)
                    text = f"the worker process ended with exit code {workers[rank].process.exitcode}"
                    answer = Failure(rank, "ProcessEnded", text, f"{text}\n", b"", time.monotonic())
                if isinstance(answer, Failure):
                    failures.append(answer)
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                else:
                    answers[rank] = answer
        return answers, failures

    def _kill(self) -> None:
        _kill_all(self._workers)

    def close(self) -> None:
        """Ends all workers. Calling it again does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _kill_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join()
        worker.process.close()
        worker.pipe.close()
    workers.clear()


def _end(workers: list[_Worker], folder: Path) -> None:
    _kill_all(workers)
    shutil.rmtree(folder, ignore_errors=True)


def _raise(failures: Sequence[Failure], silent: Sequence[int], timeout_seconds: float) -> None:
    """Raises for the first failure; a broken connection is a consequence, so it comes first only when nothing else is there."""
    if not failures:
        message = f"ranks {list(silent)} did not answer within {timeout_seconds:g} s; all workers were killed"
        raise RankError(message, silent[0])
    ordered = sorted(failures, key=lambda failure: (failure.kind == "CommunicationError", failure.at))
    first = ordered[0]
    lines = [f"rank {first.rank} failed:", first.text.rstrip()]
    lines += [
        f"rank {other.rank} failed after it: {other.kind}: {other.message.splitlines()[:1]}" for other in ordered[1:]
    ]
    known = {failure.rank for failure in failures}
    lines += [f"rank {rank} was still waiting and was killed" for rank in silent if rank not in known]
    cause = pickle.loads(first.pickled) if first.pickled else None
    if isinstance(cause, ColossalError) and cause.exit_status != ColossalError.exit_status:
        cause.add_note("\n".join(lines))
        raise cause
    raise RankError("\n".join(lines), first.rank) from cause


class _Collector(pickle.Pickler):
    """Pickles, and remembers the modules of every function and class on the way."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.modules: dict[str, str] = {}

    def persistent_id(self, found: Any) -> None:
        if isinstance(found, FunctionType | type):
            module = sys.modules.get(found.__module__)
            path = getattr(module, "__file__", None)
            if path is not None and found.__module__ != "__main__":
                self.modules[found.__module__] = path


def _pickled(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    buffer = io.BytesIO()
    collector = _Collector(buffer)
    collector.dump((function, tuple(arguments)))
    return buffer.getvalue(), tuple(collector.modules.items())
