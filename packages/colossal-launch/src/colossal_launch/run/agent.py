"""Local workers through torch's elastic agent: started, watched, stopped together, and their failures told in one message."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from colossal_core.errors import ConfigError, Problem
from colossal_launch.run.failure import FailedRank, parse_record, worker_error
from colossal_launch.run.parent import LAUNCHER_VARIABLE
from colossal_launch.run.stopping import STOPPED, exit_status


@dataclass(frozen=True)
class Entry:
    """What every worker runs: the arguments of the Python interpreter."""

    arguments: tuple[str, ...]


def training(config_path: Path) -> Entry:
    """The entry of `colossal train`: one rank of the config that was written into the run's folder."""
    return Entry(("-m", "colossal_launch.run.worker", str(config_path)))


def run_workers(entry: Entry, num_processes: int, *, port: int, timeout: timedelta) -> int:
    """Starts `num_processes` ranks on this host and waits for them. Returns the exit status; no worker is left, whatever happens.

    SIGINT, SIGTERM and SIGHUP are handed on to the workers, who save and leave; a second one kills them. A worker that fails ends the run.
    port: of the loopback store; 0: a free one. Raises ConfigError when the port is taken, WorkerError when a rank fails.
    """
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from colossal_launch.run._elastic_private import SupervisedAgent, silenced
    from colossal_launch.run.rendezvous import LoopbackRendezvous
    from colossal_launch.run.supervision import WorkerSupervisor

    server = _serve_store(port, timeout)
    logs = tempfile.mkdtemp(prefix="colossal-logs-")
    spec = WorkerSpec(
        role="colossal",
        local_world_size=num_processes,
        rdzv_handler=LoopbackRendezvous(server.store, server.port),
        entrypoint=sys.executable,
        args=entry.arguments,
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    result: RunResult | None = None
    try:
        with silenced(), _worker_environment(num_processes), WorkerSupervisor() as supervisor:
            agent = SupervisedAgent(spec, DefaultLogsSpecs(log_dir=logs), supervisor)
            try:
                result = agent.run()
            except SignalException:
                result = None
        records = _records(Path(logs))
    finally:
        server.close()
        shutil.rmtree(logs, ignore_errors=True)
    pids = {worker.local_rank: int(worker.id) for worker in agent.get_worker_group().workers if worker.id is not None}
    failed = [
        FailedRank(rank, pids.get(rank, 0), status, records.get(rank))
        for rank, status in supervisor.codes.items()
        if status != 0 and status not in STOPPED
    ]
    told = {found.rank for found in failed}
    failed += [FailedRank(rank, pids[rank], 1, found) for rank, found in records.items() if rank not in told]
    if supervisor.signal is not None:
        # Those who were still starting when the signal came die of it; that is no failure.
        failed = [found for found in failed if found.status != -supervisor.signal and found.record is not None]
        if not failed or any(-supervisor.signal == status for status in supervisor.codes.values()):
            return exit_status(supervisor.signal)
    if failed:
        raise worker_error(failed)
    stopped = STOPPED.intersection(supervisor.codes.values())
    assert stopped or (result is not None and not result.is_failed()), f"workers ended with {supervisor.codes}"
    return min(stopped, default=0)


def _serve_store(port: int, timeout: timedelta) -> Any:
    from colossal_comm.startup import StoreServer

    try:
        return StoreServer("127.0.0.1", port, timeout)
    except ConfigError as error:
        if not port:
            raise
        reason = error.problems[0].reason
        raise ConfigError([Problem("--port", reason, "choose another one, or leave it out", port)]) from None


def _records(logs: Path) -> Mapping[int, Any]:
    """Failure records by rank: torch names the files `<run>/attempt_0/<local rank>/error.json`."""
    import json

    found = {}
    for path in logs.glob("*/attempt_*/*/error.json"):
        record = parse_record(json.loads(path.read_text(encoding="utf-8")))
        if record is not None and path.parent.name.isdigit():
            found[int(path.parent.name)] = record
    return found


@contextmanager
def _worker_environment(num_processes: int) -> Iterator[None]:
    """Variables for workers, set while they start, since torch hands its own environment on.

    OMP_NUM_THREADS: a worker's share of the cores, where torch would take every core for each. TORCH_CPP_LOG_LEVEL: without warnings about
    connections to a store that has closed. Both stay as the user has set them. COLOSSAL_LAUNCHER_PID: whom workers do not outlive.
    """
    share = max(1, (os.cpu_count() or 1) // num_processes)
    wanted = {"OMP_NUM_THREADS": str(share), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    added[LAUNCHER_VARIABLE] = str(os.getpid())
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
