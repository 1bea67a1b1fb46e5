"""Exchanges as a pipeline makes them: several uses at once, receives posted early, sends that nobody waits for, failures that say where."""

from __future__ import annotations

import re
import time
import weakref
from collections import deque
from typing import Any

import pytest
import torch

from colossal_comm import RankCollectives
from colossal_core.collectives import Handle, Transfer
from colossal_core.mesh import MeshLayout

STAGES = MeshLayout((2, 1, 1, 1, 1))


def send(collectives: RankCollectives, value: float, use: str, tag: str = "") -> Handle:
    half = Transfer("send", torch.full((3,), value, dtype=torch.float32), 1 - collectives.rank)
    return collectives.start_exchange([half], "pp", use=use, tag=tag)


def receive(collectives: RankCollectives, target: torch.Tensor, use: str, tag: str = "") -> Handle:
    return collectives.start_exchange([Transfer("receive", target, 1 - collectives.rank)], "pp", use=use, tag=tag)


def opposite_orders(collectives: RankCollectives) -> list[float]:
    """Each rank waits for the use that the other one sends on last."""
    for use in ("activations", "gradients"):
        collectives.prepare("pp", use)
    uses = ("activations", "gradients") if collectives.rank == 0 else ("gradients", "activations")
    targets = [torch.empty(3) for _ in uses]
    handles = [receive(collectives, target, use) for target, use in zip(targets, uses, strict=True)]
    sends = [send(collectives, 10.0 * collectives.rank + k, use) for k, use in enumerate(uses)]
    for handle in (*handles, *sends):
        handle.wait()
    return [target[0].item() for target in targets]


def test_two_uses_in_opposite_order_do_not_deadlock(on_mesh: Any) -> None:
    assert on_mesh(STAGES, opposite_orders) == [[11.0, 10.0], [1.0, 0.0]]


def fifo(collectives: RankCollectives) -> tuple[list[float], list[float]]:
    uses = ("activations up 0", "gradients down 0")
    for use in uses:
        collectives.prepare("pp", use)
    if collectives.rank == 0:
        # Sent interleaved, asked for one use after the other.
        for handle in [
            send(collectives, value + offset, use)
            for value in range(4)
            for offset, use in ((0, uses[0]), (100, uses[1]))
        ]:
            handle.wait()
        return [], []
    found: dict[str, list[float]] = {}
    for use in reversed(uses):
        targets = [torch.empty(3) for _ in range(4)]
        for handle in [receive(collectives, target, use) for target in targets]:
            handle.wait()
        found[use] = [target[0].item() for target in targets]
    return found[uses[0]], found[uses[1]]


def test_what_is_sent_under_one_use_arrives_in_order(on_mesh: Any) -> None:
    assert on_mesh(STAGES, fifo)[1] == ([0.0, 1.0, 2.0, 3.0], [100.0, 101.0, 102.0, 103.0])


NUM_SENDS = 40


def unwaited_sends(collectives: RankCollectives) -> tuple[int, int, float]:
    """Sends whose handles are dropped once they are done, as a runner drops them: most tensors left, those left at the end, their sum."""
    if collectives.rank == 1:
        target, total = torch.empty(3), 0.0
        for _ in range(NUM_SENDS):
            receive(collectives, target, "activations").wait()
            total += target[0].item()
        return 0, 0, total
    on_their_way: deque[Handle] = deque()
    tensors: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for k in range(NUM_SENDS):
        tensor = torch.full((3,), float(k))
        tensors.append(weakref.ref(tensor))
        on_their_way.append(collectives.start_exchange([Transfer("send", tensor, 1)], "pp", use="activations"))
        del tensor
        deadline = time.monotonic() + 20
        while len(on_their_way) > 3 and time.monotonic() < deadline:
            on_their_way = deque(handle for handle in on_their_way if not handle.is_done())
            time.sleep(0.0005)
        most = max(most, sum(found() is not None for found in tensors))
    for handle in on_their_way:
        handle.wait()
        assert handle.is_done()
    # These handles are still there, and keep nothing.
    return most, sum(found() is not None for found in tensors), 0.0


def test_sends_that_are_not_waited_for_let_their_tensors_go(on_mesh: Any) -> None:
    (most, left, _), (_, _, total) = on_mesh(STAGES, unwaited_sends)
    assert most <= 4 and left == 0
    assert total == sum(range(NUM_SENDS))


def polled_receive(collectives: RankCollectives) -> float:
    if collectives.rank == 0:
        send(collectives, 5.0, "activations").wait()
        return 0.0
    target = torch.empty(3)
    handle = receive(collectives, target, "activations")
    deadline = time.monotonic() + 20
    while not handle.is_done() and time.monotonic() < deadline:
        time.sleep(0.0005)
    assert handle.is_done()
    handle.wait()
    return target[0].item()


def test_a_receive_may_be_asked_before_it_is_waited_for(on_mesh: Any) -> None:
    assert on_mesh(STAGES, polled_receive) == [0.0, 5.0]


def receives_in_vain(collectives: RankCollectives, asked_before: bool) -> str:
    if collectives.rank == 0:
        collectives.prepare("pp", "activations")
        time.sleep(2.0)
        return ""
    handle = receive(collectives, torch.empty(3), "activations", "F2.5")
    if asked_before:
        assert not handle.is_done()
        time.sleep(1.5)
        assert not handle.is_done()
    handle.wait()
    return ""


@pytest.mark.parametrize("asked_before", [False, True])
def test_a_message_that_never_comes_is_named(start_ranks: Any, asked_before: bool) -> None:
    _, failed = start_ranks(receives_in_vain, 2, asked_before, mesh=STAGES, timeout_seconds=1).outcomes()
    assert failed.kind == "CommunicationError"
    found = re.fullmatch(
        re.escape(
            "exchange #0 over pp (use 'activations', tag 'F2.5'; rank 1 receives float32 (3,) from rank 0) failed on rank 1 after "
        )
        + r"(\S+) s, among ranks 0, 1: .*Timed out waiting 1000ms for recv operation to complete.*: "
        + re.escape(
            "a rank has died or hangs, so look at the first failing rank's own message; COLOSSAL_DEBUG_COLLECTIVES=1 names the rank that "
            "never arrived; raise the timeout if it was only slow"
        ),
        failed.message,
    )
    assert found is not None and (1.5 if asked_before else 1.0) <= float(found[1]) <= 10, failed.message


def sends_both_ways_in_vain(collectives: RankCollectives) -> None:
    collectives.prepare("pp", "exchange")
    if collectives.rank == 0:
        time.sleep(1.5)
        return
    halves = [
        Transfer("send", torch.ones(2, 2), 0),
        Transfer("receive", torch.ones(3), 0),
        Transfer("receive", torch.ones(1, dtype=torch.int64), 0),
    ]
    collectives.start_exchange(halves, "pp", tag="B1.0").wait()


def test_a_failure_names_every_message_of_the_exchange(start_ranks: Any) -> None:
    _, failed = start_ranks(sends_both_ways_in_vain, 2, mesh=STAGES, timeout_seconds=1).outcomes()
    assert failed.kind == "CommunicationError"
    assert failed.message.startswith(
        "exchange #0 over pp (use 'exchange', tag 'B1.0'; rank 1 sends float32 (2, 2) to rank 0 and receives float32 (3,), int64 (1,) "
        "from rank 0) failed on rank 1 after 1."
    )


def comes_alone(collectives: RankCollectives, prepares: bool) -> None:
    if collectives.rank == 0 and prepares:
        collectives.prepare("pp", "gradients")
    if collectives.rank == 0:
        receive(collectives, torch.empty(3), "gradients", "B0.1").wait()


@pytest.mark.parametrize(
    ("prepares", "what"),
    [
        (False, "exchange #0 over pp (use 'gradients', tag 'B0.1'; rank 0 receives float32 (3,) from rank 1)"),
        (True, "making the communicator over pp (use 'gradients')"),
    ],
)
def test_a_communicator_that_the_other_rank_does_not_make_is_named(start_ranks: Any, prepares: bool, what: str) -> None:
    failed, _ = start_ranks(comes_alone, 2, prepares, mesh=STAGES, timeout_seconds=1).outcomes()
    assert failed.kind == "CommunicationError"
    found = re.match(re.escape(f"{what} failed on rank 0 after ") + r"(\S+) s, among ranks 0, 1: ", failed.message)
    assert found is not None and 0.9 <= float(found[1]) <= 10, failed.message
