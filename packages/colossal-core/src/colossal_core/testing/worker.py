"""What one process of the worker pool does: wait for a job, join a group of ranks, run the function, answer."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from colossal_core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives


@dataclass(frozen=True)
class Job:
    """One rank's part of `WorkerPool.run`. modules: (name, file) of modules that are not importable by name (pytest's importlib mode).

    payload: the pickled (function, arguments). store_path: where the group's store will be; a file that does not exist yet.
    device_type: `cpu`, or that of accelerators, of which each rank takes the one with its number.
    """

    world_size: int
    rank: int
    store_path: str
    timeout_seconds: float
    modules: tuple[tuple[str, str], ...]
    payload: bytes
    device_type: str = "cpu"


@dataclass(frozen=True)
class Failure:
    """What a rank raised. kind: class name; pickled: the exception where it can be pickled, else b""; at: seconds, to find the first."""

    rank: int
    kind: str
    message: str
    text: str
    pickled: bytes
    at: float


def connect(world_size: int, rank: int, store_path: str, timeout: timedelta, device_type: str = "cpu") -> Collectives:
    """The collectives of one rank: core's own for one rank, else those of the first plugin that provides them. They are on the CPU, or on
    the accelerator with the rank's number, which becomes this process's current one first.

    Raises: ConfigError where no plugin implements `colossal_connect`.
    """
    import torch

    from colossal_core.collectives import SingleProcess
    from colossal_core.mesh import MeshLayout
    from colossal_core.plugins import discover

    device = torch.device(device_type)
    if device.type != "cpu":
        device = torch.device(device.type, rank)
        torch.accelerator.set_device_index(rank)
    if world_size == 1:
        return SingleProcess(device)
    mesh = MeshLayout((1, 1, world_size, 1, 1))
    found: Collectives | None = discover().manager.hook.colossal_connect(
        mesh=mesh, rank=rank, device=device, store_address=f"file://{store_path}", timeout=timeout
    )
    if found is None:
        raise ConfigError([no_provider(world_size)])
    return found


def no_provider(world_size: int) -> Problem:
    """What is wrong where several ranks are asked for and nobody can connect them."""
    reason = "more than one rank needs the package colossal-comm, which is not installed"
    return Problem("world_size", reason, "pip install colossal-comm", world_size)


def work(pipe: Connection) -> None:
    """The main function of a worker: jobs in, results or failures out, until the pipe is closed."""
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True, name="end with parent").start()
    while True:
        try:
            job: Job = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        answer = _run(job)
        try:
            pipe.send_bytes(answer)
        except BrokenPipeError:
            return


def _end_with_parent() -> None:
    """A worker may hang in a collective while its parent is killed: nothing is left behind then."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(job: Job) -> bytes:
    collectives: Collectives | None = None
    try:
        for name, path in job.modules:
            _load(name, path)
        function, arguments = pickle.loads(job.payload)
        timeout = timedelta(seconds=job.timeout_seconds)
        collectives = connect(job.world_size, job.rank, job.store_path, timeout, job.device_type)
        answer = pickle.dumps(function(collectives, *arguments))
        collectives.close(timedelta(seconds=10))
    except BaseException as error:  # carried to the parent, whatever it is
        return pickle.dumps(_failure(job.rank, error))
    return answer


def _failure(rank: int, error: BaseException) -> Failure:
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # an exception that cannot be copied is told by its text
        pickled = b""
    return Failure(rank, type(error).__name__, str(error), traceback.format_exc(), pickled, time.monotonic())


def _load(name: str, path: str) -> Any:
    """Makes a module importable under the name that the parent knows it by."""
    if name in sys.modules or _is_importable(name):
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
