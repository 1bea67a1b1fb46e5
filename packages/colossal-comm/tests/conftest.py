"""Fixtures that run one function on several ranks: as gloo processes from a preloaded forkserver, or as simulated ranks in threads."""

from __future__ import annotations

import multiprocessing
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from colossal_comm import run_simulated
from colossal_core.mesh import MeshLayout

RANK_PROCESS = str(Path(__file__).parent / "rank_process.py")
PRELOADED = ["torch", "torch.distributed", "colossal_comm.startup", "colossal_comm.groups", "colossal_comm.debug"]


@dataclass(frozen=True)
class RankFailure:
    """What a rank raised, or how it died (kind `exit status`)."""

    kind: str
    message: str
    details: str = ""


@dataclass
class Ranks:
    """Processes of one test, started together."""

    processes: list[BaseProcess] = field(default_factory=list)
    replies: list[Connection] = field(default_factory=list)

    def outcomes(self, seconds: float = 60) -> list[Any]:
        """What each rank returned, or its `RankFailure`; kills those that hang."""
        for process, reply in zip(self.processes, self.replies, strict=True):
            wait([reply, process.sentinel], seconds)
        found = [_outcome(process, reply) for process, reply in zip(self.processes, self.replies, strict=True)]
        for process in self.processes:
            process.join(10)
        return found

    def stop(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join(10)
        for reply in self.replies:
            reply.close()


def _outcome(process: BaseProcess, reply: Connection) -> Any:
    try:
        if not reply.poll(0):
            return RankFailure("exit status", str(process.exitcode))
        answer = reply.recv()
    except EOFError:
        process.join(10)
        return RankFailure("exit status", str(process.exitcode))
    return answer[1] if answer[0] == "returned" else RankFailure(*answer[1:])


class StartRanks(Protocol):
    def __call__(
        self,
        function: Callable[..., Any],
        num_ranks: int,
        *arguments: Any,
        mesh: MeshLayout | None = None,
        address: str = "",
        debug: bool = False,
        timeout_seconds: float = 30,
    ) -> Ranks: ...


class RunOnMesh(Protocol):
    def __call__(self, mesh: MeshLayout, function: Callable[..., Any], *arguments: Any) -> list[Any]: ...


@pytest.fixture(scope="session")
def forkserver() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture
def start_ranks(forkserver: multiprocessing.context.ForkServerContext, tmp_path: Path) -> Iterator[StartRanks]:
    """Starts `function(collectives, *arguments)` on the ranks of a mesh, or `function(rank, address, *arguments)` without one."""
    started: list[Ranks] = []

    def start(
        function: Callable[..., Any],
        num_ranks: int,
        *arguments: Any,
        mesh: MeshLayout | None = None,
        address: str = "",
        debug: bool = False,
        timeout_seconds: float = 30,
    ) -> Ranks:
        ranks = Ranks()
        started.append(ranks)
        for rank in range(num_ranks):
            receiver, sender = forkserver.Pipe(duplex=False)
            call = {
                "path": function.__code__.co_filename,
                "function": function.__name__,
                "arguments": arguments,
                "mesh": mesh,
                "rank": rank,
                "address": address or f"file://{tmp_path}/store{len(started)}",
                "debug": debug,
                "timeout_seconds": timeout_seconds,
                "reply": sender,
            }
            process = forkserver.Process(
                target=runpy.run_path, args=(RANK_PROCESS,), kwargs={"init_globals": {"CALL": call}}, daemon=True
            )
            process.start()
            sender.close()
            ranks.processes.append(process)
            ranks.replies.append(receiver)
        return ranks

    yield start
    for ranks in started:
        ranks.stop()


def _returned(outcomes: list[Any]) -> list[Any]:
    failures = [outcome for outcome in outcomes if isinstance(outcome, RankFailure)]
    assert not failures, "\n".join(f"{failure.kind}: {failure.message}\n{failure.details}" for failure in failures)
    return outcomes


@pytest.fixture
def on_gloo(start_ranks: StartRanks) -> RunOnMesh:
    """Runs a function on gloo processes and returns what each rank returned."""

    def run(mesh: MeshLayout, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return _returned(start_ranks(function, mesh.world_size, *arguments, mesh=mesh).outcomes())

    return run


@pytest.fixture(params=["gloo", "debug", "simulated"])
def on_mesh(request: pytest.FixtureRequest, start_ranks: StartRanks) -> RunOnMesh:
    """Runs a function on gloo processes, on gloo under debug mode, and on simulated ranks: three ways that must not differ."""

    def run(mesh: MeshLayout, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if request.param == "simulated":
            return run_simulated(mesh, lambda collectives: function(collectives, *arguments))
        debug = request.param == "debug"
        return _returned(start_ranks(function, mesh.world_size, *arguments, mesh=mesh, debug=debug).outcomes())

    return run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
