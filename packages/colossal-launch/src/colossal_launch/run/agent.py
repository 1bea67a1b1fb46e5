"""Local workers through torch's elastic agent, with a store of our own: on the loopback interface only, and nothing in it is unpickled.

torch's rendezvous handlers serve a store on every interface and unpickle what they read there; here one host needs no rendezvous, so
the handler hands out a loopback store that this process serves.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_core.errors import ColossalError
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

if TYPE_CHECKING:
    from torch.distributed import Store


class WorkerFailure(ColossalError):
    """A rank failed. The message is the traceback of the first one; the others are folded into one line."""


class LoopbackRendezvous(RendezvousHandler):
    """A rendezvous of one host: it is always complete."""

    def __init__(self, store: Store, port: int) -> None:
        self._store = store
        self._port = port
        self._closed = False

    def get_backend(self) -> str:
        return "colossal-loopback"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("127.0.0.1", self._port))

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return f"colossal-{os.getpid()}"

    def shutdown(self) -> bool:
        self._closed = True
        return True


@dataclass(frozen=True)
class Entry:
    """What every worker runs: the arguments of the Python interpreter."""

    arguments: tuple[str, ...]


def training(config_path: Path) -> Entry:
    """The entry of `colossal train`: one rank of the config that was written into the run's folder."""
    return Entry(("-m", "colossal_launch.run.worker", str(config_path)))


def run_workers(entry: Entry, num_processes: int, *, port: int, timeout: timedelta, debug: bool) -> int:
    """Starts `num_processes` ranks on this host and waits for them. Returns the exit status.

    port: of the loopback store; 0: a free one. Raises ConfigError when the port is taken, WorkerFailure when a rank fails.
    """
    from colossal_comm.startup import StoreServer
    from torch.distributed.elastic.agent.server.api import WorkerSpec, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException

    server = StoreServer("127.0.0.1", port, timeout)
    logs = tempfile.mkdtemp(prefix="colossal-logs-")
    handler = LoopbackRendezvous(server.store, server.port)
    spec = WorkerSpec(
        role="colossal",
        local_world_size=num_processes,
        rdzv_handler=handler,
        entrypoint=sys.executable,
        args=entry.arguments,
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=logs), start_method="spawn", exit_barrier_timeout=5)
    try:
        with _one_thread_each(num_processes):
            result = agent.run()
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    finally:
        server.close()
        shutil.rmtree(logs, ignore_errors=True)
    if result.state is WorkerState.SUCCEEDED or not result.failures:
        return 0
    return _status(result.failures, debug)


def _status(failures: dict[int, Any], debug: bool) -> int:
    """The exit status of failed ranks: that of a signal when all stopped for one, else a report of the first failure."""
    codes = {failure.exitcode for failure in failures.values()}
    if codes <= {130, 143}:
        return int(min(codes))
    rank, first = min(failures.items(), key=lambda item: (item[1].timestamp, item[0]))
    raise WorkerFailure(_report(rank, first, failures, debug))


def _report(rank: int, first: Any, failures: dict[int, Any], debug: bool) -> str:
    message = first.message
    details = message.get("message", message) if isinstance(message, dict) else message
    info = message.get("extraInfo", {}) if isinstance(message, dict) else {}
    traceback = str(info.get("py_callstack", ""))
    died = f"signal {-first.exitcode}" if first.exitcode < 0 else f"exit status {first.exitcode}"
    lines = [f"rank {rank} (pid {first.pid}) failed first, with {died}: {details}"]
    if traceback and debug:
        lines.append(traceback.rstrip())
    others = sorted(other for other in failures if other != rank)
    if others:
        lines.append(f"ranks {', '.join(map(str, others))} failed after it")
    return "\n".join(lines)


class _one_thread_each:  # noqa: N801 - used like the context managers of contextlib
    """While workers start: their share of the cores as OMP_NUM_THREADS, unless the user has set it. torch's own default is every core
    for each worker.
    """

    def __init__(self, num_processes: int) -> None:
        self._share = max(1, (os.cpu_count() or 1) // num_processes)
        self._set = "OMP_NUM_THREADS" not in os.environ

    def __enter__(self) -> None:
        if self._set:
            os.environ["OMP_NUM_THREADS"] = str(self._share)

    def __exit__(self, *details: object) -> None:
        if self._set:
            os.environ.pop("OMP_NUM_THREADS", None)
