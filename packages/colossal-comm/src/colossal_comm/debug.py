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
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_core.errors import CommunicationError

if TYPE_CHECKING:
    import torch.distributed as dist
    from colossal_core.collectives import Handle, Transfer

    from colossal_comm.transport import Call

_POLL_SECONDS = (0.0002, 0.01)
_GRACE_SECONDS = 1.0
"""How long a mismatch waits for the calls of ranks that have not arrived yet, so that the report is whole."""

_OWN_FOLDER = str(Path(__file__).parent)


def call_site() -> str:
    """`file:line` of the innermost caller outside this package and torch."""
    import torch

    hidden = (_OWN_FOLDER, str(Path(torch.__file__).parent), "<")
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(hidden):
        if frame.f_back is None:
            return "compiled or backward code"
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class StoreGuard:
    """Compares fingerprints through the store of the group. timeout: how long to wait for the others before naming them."""

    def __init__(self, store: dist.Store, rank: int, timeout: timedelta) -> None:
        self._store = store
        self._rank = rank
        self._timeout = timeout.total_seconds()
        self._transfers: dict[str, int] = {}
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
        lines.append("  look at what these ranks do instead: a condition that differs between ranks, an exception, or a slow step")
        return "\n".join(lines)

    def exchange(self, call: Call, transfers: Sequence[Transfer], issue: Callable[[], Handle]) -> Handle:
        raise NotImplementedError


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
    lines = [f"ranks called different collectives as number {call.sequence} on one communicator (use {call.group.use!r}):"]
    for rank in call.group.ranks:
        lines.append(f"  rank {rank}: {describe(calls[rank]) if rank in calls else 'nothing yet'}")
    lines.append("  every rank of a group must call the same collectives in the same order, with the same shape, dtype and tag")
    return "\n".join(lines)
