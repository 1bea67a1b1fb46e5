"""Debug mode: before a collective starts, its fingerprint is compared among the ranks of the group, through the store.

torch's own debug mode cannot see two collectives of the same shape called in different order; they give wrong numbers in silence.
A fingerprint holds the sequence number on the communicator, operation, axes, shape, dtype, tag, and the line that called. A mismatch
raises CommunicationError on every rank and names each rank's call; a rank that does not come within the timeout is named with
the last call that it announced. Each collective costs one store write and some polling reads, so this is for tests and for hunting,
not for training runs.

Point-to-point: a sender announces and goes on; a receiver compares before it takes the data (on gloo it only then posts the receive,
since a message of another size would abort the process).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from colossal_core.errors import CommunicationError

if TYPE_CHECKING:
    from colossal_comm._torch_private import Store
    from colossal_comm.transport import Call
    from colossal_core.collectives import Handle, Transfer

_POLL_SECONDS = (0.0002, 0.01)
_GRACE_SECONDS = 1.0
"""How long a mismatch waits for the calls of ranks that have not arrived yet, so that the report is whole."""

_OWN_FOLDER = str(Path(__file__).parent)


def call_site() -> str:
    """`file:line` of the innermost caller outside this package and torch."""
    import torch

    hidden = (_OWN_FOLDER, str(Path(torch.__file__).parent), "<")
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(hidden):
        frame = frame.f_back
    return "a thread of autograd" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


class StoreGuard:
    """Compares fingerprints through the store of the group. timeout: how long to wait for the others before naming them."""

    def __init__(self, store: Store, rank: int, timeout: timedelta) -> None:
        self._store = store
        self._rank = rank
        self._timeout = timeout.total_seconds()
        self._transfers: dict[str, int] = {}
        self._receives: dict[str, deque[Receive]] = {}
        self._lock = threading.Lock()

    def check(self, call: Call) -> None:
        own = fingerprint(call, call_site())
        base = f"colossal/calls/{call.group.name}"
        place = call.group.index
        self._announce(f"{base}/{call.sequence}/{place}", own)
        others = {index: f"{base}/{call.sequence}/{index}" for index in range(call.group.size) if index != place}
        found = self._collect(call, own, others)
        calls = {call.group.ranks[index]: text for index, text in found.items()}
        calls[self._rank] = own
        if not agree(own, place, found):
            raise CommunicationError(_mismatch(call, calls))
        # Who announces call k has read all of call k - 1; so all have read this rank's fingerprint of k - 1, and it can go.
        if call.sequence > 0:
            self._store.delete_key(f"{base}/{call.sequence - 1}/{place}")

    def _announce(self, key: str, text: str) -> None:
        self._store.set(key, text)
        self._store.set(f"colossal/last_call/{self._rank}", text)

    def _collect(self, call: Call, own: str, keys: dict[int, str]) -> dict[int, str]:
        """The fingerprints of the others; those that are there when one of them differs, or an error when the time is over."""
        found: dict[int, str] = {}
        started = time.monotonic()
        deadline = started + self._timeout
        pause = _POLL_SECONDS[0]
        while len(found) < len(keys):
            for index, key in keys.items():
                if index not in found and self._store.check([key]):
                    found[index] = self._store.get(key).decode()
            if len(found) == len(keys):
                break
            if found and not agree(own, call.group.index, found):
                deadline = min(deadline, started + _GRACE_SECONDS)
            if time.monotonic() > deadline:
                if agree(own, call.group.index, found):
                    raise CommunicationError(self._hang(call, [index for index in keys if index not in found]))
                break
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_SECONDS[1])
        return found

    def _hang(self, call: Call, missing: Sequence[int]) -> str:
        ranks = [call.group.ranks[index] for index in missing]
        names = "{" + ", ".join(str(rank) for rank in ranks) + "}"
        lines = [f"ranks {names} never reached {call} within {self._timeout:g} s"]
        for rank in ranks:
            key = f"colossal/last_call/{rank}"
            last = describe(self._store.get(key).decode()) if self._store.check([key]) else "no collective at all"
            lines.append(f"  rank {rank} last announced: {last}")
        lines.append(
            "  look at what these ranks do instead: a condition that differs between ranks, an exception, or a slow step"
        )
        return "\n".join(lines)

    def exchange(
        self, call: Call, transfers: Sequence[Transfer], issue: Callable[[Sequence[Transfer]], Handle]
    ) -> Handle:
        """Announces the sends and starts them; compares each receive with its sender's announcement when it is waited for."""
        site = call_site()
        sends = [transfer for transfer in transfers if transfer.kind == "send"]
        receives = [transfer for transfer in transfers if transfer.kind == "receive"]
        for transfer in sends:
            peer = call.group.ranks[transfer.peer]
            key = self._transfer_key(call.group.name, self._rank, peer)
            self._store.set(key, transfer_fingerprint(transfer, call.tag, site))
        self._store.set(f"colossal/last_call/{self._rank}", fingerprint(call, site))
        # On an accelerator sends and receives must start together (NCCL blocks its stream); on gloo a receive of another size
        # than was sent aborts the process, so it starts after the comparison.
        together = issue(transfers) if transfers[0].tensor.device.type != "cpu" else None
        started = together if together is not None or not sends else issue(sends)
        guarded = []
        for transfer in receives:
            peer = call.group.ranks[transfer.peer]
            key = self._transfer_key(call.group.name, peer, self._rank)
            own = transfer_fingerprint(transfer, call.tag, site)
            receive = Receive(self._compare_transfer(call, key, own, peer), _issue_one(issue, transfer, together))
            queue = self._receives.setdefault(key.rsplit("/", 1)[0], deque())
            queue.append(receive)
            guarded.append((queue, receive))
        return GuardedExchange(started, guarded)

    def _transfer_key(self, name: str, source: int, target: int) -> str:
        """The key of the next transfer between two ranks; both count."""
        box = f"colossal/transfers/{name}/{source}-{target}"
        with self._lock:
            number = self._transfers.get(box, 0)
            self._transfers[box] = number + 1
        return f"{box}/{number}"

    def _compare_transfer(self, call: Call, key: str, own: str, peer: int) -> Callable[[bool], bool]:
        """A function that compares what was sent with what is received; False when not there yet and asked not to wait."""

        def compare(block: bool) -> bool:
            deadline = time.monotonic() + self._timeout
            while not self._store.check([key]):
                if not block:
                    return False
                if time.monotonic() > deadline:
                    raise CommunicationError(self._hang(call, [call.group.ranks.index(peer)]))
                time.sleep(_POLL_SECONDS[0])
            theirs = self._store.get(key).decode()
            self._store.delete_key(key)
            mine, other = json.loads(own), json.loads(theirs)
            if {**mine, "site": ""} != {**other, "site": ""}:
                raise CommunicationError(
                    f"rank {peer} sends something else than rank {self._rank} receives (transfer {key.rsplit('/', 1)[1]} between them over "
                    f"{', '.join(call.group.axes)}):\n  rank {peer} sends {describe_transfer(other)}\n"
                    f"  rank {self._rank} receives {describe_transfer(mine)}\n"
                    "  both must name the same shape, dtype and tag, in the same order"
                )
            return True

        return compare


class Receive:
    """A receive that starts when it has been compared."""

    def __init__(self, compare: Callable[[bool], bool], issue: Callable[[], Handle]) -> None:
        self._compare, self._issue = compare, issue
        self.work: Handle | None = None

    def start(self, block: bool) -> bool:
        """Starts it unless it has; False when what is sent is not announced yet."""
        if self.work is None and self._compare(block):
            self.work = self._issue()
        return self.work is not None


class GuardedExchange:
    """Sends that are on their way, and receives that start in the order in which they were asked for, whatever is waited for first."""

    def __init__(self, sends: Handle | None, receives: list[tuple[deque[Receive], Receive]]) -> None:
        self._sends, self._receives = sends, receives

    def _start(self, queue: deque[Receive], receive: Receive, block: bool) -> bool:
        while receive.work is None:
            if not queue[0].start(block):
                return False
            queue.popleft()
        return True

    def wait(self) -> None:
        for queue, receive in self._receives:
            self._start(queue, receive, block=True)
        for _, receive in self._receives:
            assert receive.work is not None
            receive.work.wait()
        if self._sends is not None:
            self._sends.wait()

    def is_done(self) -> bool:
        for queue, receive in self._receives:
            if not self._start(queue, receive, block=False) or receive.work is None or not receive.work.is_done():
                return False
        return self._sends is None or self._sends.is_done()


def _issue_one(
    issue: Callable[[Sequence[Transfer]], Handle], transfer: Transfer, together: Handle | None
) -> Callable[[], Handle]:
    return lambda: issue([transfer]) if together is None else together


def transfer_fingerprint(transfer: Transfer, tag: str, site: str) -> str:
    """One half of a transfer as JSON: what both sides must agree on, and the line."""
    shape, dtype = str(tuple(transfer.tensor.shape)), str(transfer.tensor.dtype).removeprefix("torch.")
    return json.dumps({"shape": shape, "dtype": dtype, "tag": tag, "site": site})


def describe_transfer(call: dict[str, str]) -> str:
    """A transfer's fingerprint for people."""
    tag = f", tag {call['tag']!r}" if call["tag"] else ""
    return f"{call['shape']}, {call['dtype']}{tag}, at {call['site']}"


def fingerprint(call: Call, site: str) -> str:
    """A call as JSON: what all ranks must agree on, in the order in which it is reported."""
    return json.dumps(
        {
            "operation": call.operation,
            "sequence": call.sequence,
            "axes": list(call.group.axes),
            "shape": call.shape,
            "dtype": call.dtype,
            "detail": call.detail,
            "tag": call.tag,
            "site": site,
            "sizes": call.sizes,
        }
    )


def agree(own: str, place: int, others: dict[int, str]) -> bool:
    """Whether all fingerprints are of one call: equal but for the sizes of an all-to-all, which must match pair by pair."""
    mine = json.loads(own)
    for index, text in others.items():
        other = json.loads(text)
        if {**mine, "sizes": None} != {**other, "sizes": None}:
            return False
        if mine["sizes"] is None:
            continue
        (sent, received), (their_sent, their_received) = mine["sizes"], other["sizes"]
        if sent[index] != their_received[place] or received[index] != their_sent[place]:
            return False
    return True


def describe(text: str) -> str:
    """A fingerprint for people."""
    call = json.loads(text)
    parts = [f"{call['operation']} #{call['sequence']} over {', '.join(call['axes'])}", call["shape"], call["dtype"]]
    if call["detail"]:
        parts.append(call["detail"])
    if call["sizes"]:
        parts.append(f"sends {call['sizes'][0]} and receives {call['sizes'][1]} rows")
    if call["tag"]:
        parts.append(f"tag {call['tag']!r}")
    return f"{', '.join(parts)}, at {call['site']}"


def _mismatch(call: Call, calls: dict[int, str]) -> str:
    lines = [
        f"ranks called different collectives as number {call.sequence} on one communicator (use {call.group.use!r}):"
    ]
    lines += [
        f"  rank {rank}: {describe(calls[rank]) if rank in calls else 'nothing yet'}" for rank in call.group.ranks
    ]
    lines.append(
        "  every rank of a group must call the same collectives in the same order, with the same shape, dtype and tag"
    )
    return "\n".join(lines)
