"""Local workers through torch's elastic agent: started, watched, stopped together, and their failures told in one message."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from colossal_core.errors import ConfigError, Problem
from colossal_launch.run.failure import FailedRank, FailureRecord, parse_record, worker_error
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
    from torch.distributed.elastic.agent.server.api import WorkerSpec
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
    try:
        with silenced(), _worker_environment(num_processes), WorkerSupervisor() as supervisor:
            agent = SupervisedAgent(spec, DefaultLogsSpecs(log_dir=logs), supervisor)
            with suppress(SignalException):
                agent.run()
        records = _records(Path(logs))
    finally:
        server.close()
        shutil.rmtree(logs, ignore_errors=True)
    pids = {worker.local_rank: worker.id for worker in agent.get_worker_group().workers if worker.id is not None}
    return _outcome(supervisor.signal, supervisor.codes, pids, records)


def _outcome(
    number: int | None, codes: Mapping[int, int], pids: Mapping[int, int], records: Mapping[int, FailureRecord]
) -> int:
    """The exit status of a run. number: the signal that stopped it. codes: exit statuses of the ranks that had ended when the others were
    ended. Raises WorkerError when ranks failed.
    """
    statuses = dict.fromkeys(records, 1) | dict(codes)
    failed = [
        FailedRank(rank, pids.get(rank, 0), status, records.get(rank))
        for rank, status in statuses.items()
        if status != 0 and status not in STOPPED
    ]
    if number is not None:
        # A rank that was still starting dies of the signal, and the others miss it: that is no failure. A save that failed is one.
        if -number in codes.values() or all(rank.record is None for rank in failed):
            return exit_status(number)
        failed = [rank for rank in failed if rank.record is not None]
    if failed:
        raise worker_error(failed)
    return min(STOPPED.intersection(codes.values()), default=0)


def _serve_store(port: int, timeout: timedelta) -> Any:
    from colossal_comm.startup import StoreServer

    try:
        return StoreServer("127.0.0.1", port, timeout)
    except ConfigError as error:
        if not port:
            raise
        reason = error.problems[0].reason
        raise ConfigError([Problem("--port", reason, "choose another one, or leave it out", port)]) from None


def _records(logs: Path) -> Mapping[int, FailureRecord]:
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
