"""The private parts of torch's elastic agent that this package reaches into, in one place. Tried on torch 2.13.

The agent ends workers by SIGTERM and waits for 30 s, whatever happened, and its signal handlers leave no time to save. So what it does
when a worker has failed and when it is stopped itself is handed to a `Supervisor`.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Mapping
from typing import Any, Protocol

from torch._C._distributed_c10d import Store
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs

__all__ = ["Store", "SupervisedAgent", "Supervisor", "silenced"]

Workers = Mapping[int, "subprocess.Popen[Any]"]
"""The worker processes of this host by local rank."""


class Supervisor(Protocol):
    """Decides how workers end."""

    def started(self) -> None:
        """Called when all workers run, after torch has installed its signal handlers."""

    def look(self, workers: Workers) -> None:
        """Called a few times a second, before torch looks. When it finds a failed worker it ends the others and returns."""

    def end(self, workers: Workers, number: int | None) -> None:
        """Called when the agent leaves: because of the signal `number`, or None. Returns when no worker runs."""


class SupervisedAgent(LocalElasticAgent):
    """torch's agent of one host; a supervisor ends its workers."""

    def __init__(self, spec: WorkerSpec, logs: LogsSpecs, supervisor: Supervisor) -> None:
        super().__init__(spec, logs, start_method="spawn", exit_barrier_timeout=5)
        self._supervisor = supervisor

    def _workers(self) -> Workers:
        context: Any = self._pcontext
        handlers: Mapping[int, Any] = context.subprocess_handlers if context is not None else {}
        return {local_rank: handler.proc for local_rank, handler in handlers.items()}

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        self._supervisor.started()
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._supervisor.look(self._workers())
        found: RunResult = super()._monitor_workers(worker_group)
        return found

    def _shutdown(self, death_sig: Any = None, *arguments: Any, **options: Any) -> None:
        self._supervisor.end(self._workers(), death_sig)
        super()._shutdown(*arguments, **options)


class silenced:  # noqa: N801 - used like the context managers of contextlib
    """While it is open, what torch's agent logs goes nowhere: what the user needs of it is in our own messages."""

    def __init__(self) -> None:
        self._logger = logging.getLogger("torch.distributed.elastic")
        self._handler = logging.NullHandler()

    def __enter__(self) -> None:
        self._propagated = self._logger.propagate
        self._logger.propagate = False
        self._logger.addHandler(self._handler)

    def __exit__(self, *details: object) -> None:
        self._logger.propagate = self._propagated
        self._logger.removeHandler(self._handler)
