"""What is peculiar to simulated ranks: order of results, determinism, and how failures end."""

from __future__ import annotations

import re
import threading
import time
from datetime import timedelta

import pytest
import torch

from colossal_comm import run_simulated
from colossal_core.collectives import Collectives, Transfer
from colossal_core.errors import CommunicationError
from colossal_core.mesh import MeshLayout

MESH = MeshLayout((1, 1, 3, 1, 1))


def test_results_in_rank_order_and_sums_in_rank_order() -> None:
    def total(collectives: Collectives) -> float:
        tensor = torch.tensor([[1e8, 1.0, -1e8][collectives.rank]], dtype=torch.float32)
        collectives.start_all_reduce(tensor, "dp").wait()
        return tensor.item()

    assert run_simulated(MESH, lambda collectives: collectives.rank) == [0, 1, 2]
    assert run_simulated(MESH, total) == [(torch.tensor(1e8) + 1.0 - 1e8).item()] * 3


def test_the_first_exception_is_raised_and_the_others_stop_at_once() -> None:
    def fails(collectives: Collectives) -> None:
        if collectives.rank == 1:
            raise ValueError("rank 1 is broken")
        collectives.barrier("dp")

    began, before = time.monotonic(), threading.active_count()
    with pytest.raises(ValueError, match=r"^rank 1 is broken$"):
        run_simulated(MESH, fails)
    assert time.monotonic() - began < 5
    assert threading.active_count() == before


def test_a_rank_that_finished_is_not_waited_for() -> None:
    def leaves_early(collectives: Collectives) -> None:
        if collectives.rank != 2:
            collectives.start_all_reduce(torch.ones(2), "dp").wait()

    message = (
        "ranks {2} never reached all_reduce sum of float32 (2,) #0 of ranks [0, 1, 2] (use 'reduce') "
        "before their function ended"
    )
    with pytest.raises(CommunicationError, match=f"^{re.escape(message)}$"):
        run_simulated(MESH, leaves_early)


def test_different_calls_are_told() -> None:
    def disagree(collectives: Collectives) -> None:
        collectives.start_all_reduce(torch.ones(2 + collectives.rank // 2), "dp").wait()

    message = (
        "ranks called different collectives as number 0 (use 'reduce'): rank 0: all_reduce sum of float32 (2,); "
        "rank 1: all_reduce sum of float32 (2,); rank 2: all_reduce sum of float32 (3,)"
    )
    with pytest.raises(CommunicationError, match=f"^{re.escape(message)}$"):
        run_simulated(MESH, disagree)


def test_a_receive_without_a_send_times_out() -> None:
    def waits(collectives: Collectives) -> None:
        if collectives.rank == 0:
            collectives.start_exchange([Transfer("receive", torch.ones(1), 1)], "dp", use="links", tag="F0.2").wait()
        else:
            time.sleep(0.5)

    message = (
        "ranks {1} never reached an exchange of ranks [0, 1, 2] (use 'links', tag 'F0.2') where rank 0 receives float32 (1,) from rank 1 "
        "within 0.1 s"
    )
    with pytest.raises(CommunicationError, match=f"^{re.escape(message)}$"):
        run_simulated(MESH, waits, timeout=timedelta(seconds=0.1))


def test_uses_are_apart() -> None:
    def crosses(collectives: Collectives) -> list[float]:
        first, second = torch.zeros(1), torch.zeros(1)
        if collectives.rank == 0:
            collectives.start_exchange([Transfer("send", first + 1, 1)], "dp", use="a").wait()
            collectives.start_exchange([Transfer("send", second + 2, 1)], "dp", use="b").wait()
        if collectives.rank == 1:
            collectives.start_exchange([Transfer("receive", second, 0)], "dp", use="b").wait()
            collectives.start_exchange([Transfer("receive", first, 0)], "dp", use="a").wait()
        return [first.item(), second.item()]

    assert run_simulated(MESH, crosses) == [[0, 0], [1, 2], [0, 0]]


def test_grad_mode_of_the_caller_holds() -> None:
    with torch.no_grad():
        assert run_simulated(MESH, lambda _: torch.is_grad_enabled()) == [False] * 3
