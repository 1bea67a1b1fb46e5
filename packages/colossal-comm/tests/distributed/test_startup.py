"""Joining, leaving, and what is said when others do not come, die, or hang."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from colossal_comm import RankCollectives, StoreServer, join, leave
from colossal_core.mesh import MeshLayout

PAIR = MeshLayout((1, 1, 2, 1, 1))


def free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def listening(port: int) -> list[str]:
    """Addresses (hexadecimal, as the kernel prints them) on which somebody listens at a port."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.rsplit(":", 1)[1], 16) == port:
                found.append(address.rsplit(":", 1)[0])
    return found


def joins_and_leaves(rank: int, address: str, port: int) -> tuple[float, list[str], int, list[str]]:
    collectives = join(PAIR, rank, torch.device("cpu"), address, timedelta(seconds=20))
    tensor = torch.tensor([rank + 1.0])
    collectives.start_all_reduce(tensor, "dp_shard").wait()
    collectives.barrier("dp")
    where = listening(port)
    collectives.barrier("dp")
    leave(collectives)
    leave(collectives)
    return tensor.item(), where, len(os.listdir("/proc/self/task")), listening(port) if rank == 0 else []


def test_the_store_listens_on_loopback_only_and_nothing_is_left(start_ranks: Any) -> None:
    port = free_port()
    ranks = start_ranks(joins_and_leaves, 2, port, address=f"tcp://127.0.0.1:{port}")
    assert ranks.outcomes() == [(3.0, ["0100007F"], 1, []), (3.0, ["0100007F"], 1, [])]


def test_ranks_join_a_store_that_somebody_else_serves(start_ranks: Any) -> None:
    server = StoreServer("localhost")
    port = int(re.fullmatch(r"tcp://localhost:(\d+)\?hosted", server.address)[1])  # type: ignore[index]
    found = start_ranks(joins_and_leaves, 2, port, address=f"{server.address}&prefix=attempt_1").outcomes()
    server.close()
    assert [(total, where, threads) for total, where, threads, _ in found] == [(3.0, ["0100007F"], 1)] * 2
    assert listening(port) == []


def twice(rank: int, address: str) -> list[float]:
    found = []
    for attempt in range(2):
        collectives = join(PAIR, rank, torch.device("cpu"), f"{address}{attempt}", timedelta(seconds=20))
        tensor = torch.tensor([float(rank + attempt)])
        collectives.start_all_reduce(tensor, "dp").wait()
        leave(collectives)
        found.append(tensor.item())
    return found


def test_a_process_may_join_again(start_ranks: Any) -> None:
    assert start_ranks(twice, 2).outcomes() == [[1.0, 3.0], [1.0, 3.0]]


def joins_alone(rank: int, address: str) -> None:
    join(MeshLayout((1, 1, 4, 1, 1)), rank, torch.device("cpu"), address, timedelta(seconds=0.5))


def test_ranks_that_do_not_join_are_named(start_ranks: Any) -> None:
    first, second = start_ranks(joins_alone, 2).outcomes()
    assert first.kind == second.kind == "CommunicationError"
    assert first.message == (
        "rank 0 waited 0.5 s for ranks 2, 3 of 4 to join: "
        "look at their own messages, or check that all ranks were started with the same store address"
    )


def joins_taken_port(rank: int, address: str) -> None:
    join(PAIR, rank, torch.device("cpu"), address, timedelta(seconds=5))


def test_a_taken_port_is_a_config_error(start_ranks: Any) -> None:
    with contextlib.closing(socket.socket()) as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        (found,) = start_ranks(joins_taken_port, 1, address=f"tcp://127.0.0.1:{port}").outcomes()
    assert (found.kind, found.message) == (
        "ConfigError",
        f"store_address='127.0.0.1:{port}': the port is taken: choose another port, or stop the other run",
    )


def dies(collectives: RankCollectives) -> None:
    tensor = torch.ones(4)
    collectives.start_all_reduce(tensor, "dp").wait()
    if collectives.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    collectives.start_all_reduce(tensor, "dp", tag="grad bucket 3").wait()


def test_a_dead_peer_is_an_error_that_names_the_call(start_ranks: Any) -> None:
    began = time.monotonic()
    first, second = start_ranks(dies, 2, mesh=PAIR).outcomes()
    assert time.monotonic() - began < 10
    assert second.kind == "exit status" and second.message == "-9"
    assert first.kind == "CommunicationError"
    pattern = (
        r"all_reduce #1 over dp \(use 'reduce', tag 'grad bucket 3'\) failed on rank 0 after \d+\.\d s, among ranks 0, 1: .+: "
        r"a rank has died or hangs, so look at the first failing rank's own message; COLOSSAL_DEBUG_COLLECTIVES=1 names the rank "
        r"that never arrived; raise the timeout if it was only slow"
    )
    assert re.fullmatch(pattern, first.message), first.message


def hangs(collectives: RankCollectives) -> None:
    tensor = torch.ones(4)
    collectives.start_all_reduce(tensor, "dp").wait()
    if collectives.rank == 1:
        time.sleep(3)
        return
    collectives.start_all_reduce(tensor, "dp", tag="late").wait()


def test_a_hang_ends_with_the_timeout(start_ranks: Any) -> None:
    first, _ = start_ranks(hangs, 2, mesh=PAIR, timeout_seconds=1).outcomes()
    assert first.kind == "CommunicationError"
    assert re.match(r"all_reduce #1 over dp \(use 'reduce', tag 'late'\) failed on rank 0 after 1\.\d s", first.message)


def connects_as_plugin(rank: int, address: str) -> tuple[tuple[int, int], float, bool]:
    from colossal_comm import plugin

    before = dict(os.environ)
    device = torch.device("cpu")
    collectives = plugin.colossal_connect(PAIR, rank, device, address, timedelta(seconds=20))
    assert isinstance(collectives, RankCollectives)
    tensor = torch.tensor([1.0])
    collectives.start_all_reduce(tensor, "dp").wait()
    leave(collectives)
    return plugin.COLOSSAL_PLUGIN_API, tensor.item(), dict(os.environ) == before


def test_the_plugin_connects_and_sets_no_variable(start_ranks: Any) -> None:
    assert start_ranks(connects_as_plugin, 2).outcomes() == [((0, 1), 2.0, True)] * 2
