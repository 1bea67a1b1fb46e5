"""A collective on its way, and what is said when it fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from colossal_core.errors import CommunicationError

if TYPE_CHECKING:
    import torch

    from colossal_comm.transport import Call, Group, Transport
    from colossal_core.collectives import Handle


def failure(what: str, group: Group, seconds: float, error: BaseException) -> CommunicationError:
    """The error for a collective that the backend gave up: which call, among whom, after how long, and what to do."""
    ranks = ", ".join(str(rank) for rank in group.ranks)
    own = group.ranks[group.index]
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CommunicationError(
        f"{what} failed on rank {own} after {seconds:.1f} s, among ranks {ranks}: {reason}: "
        "a rank has died or hangs, so look at the first failing rank's own message; COLOSSAL_DEBUG_COLLECTIVES=1 names the rank that never "
        "arrived; raise the timeout if it was only slow"
    )


def started(call: Call, issue: Callable[[], Handle], finish: Callable[[], None] | None = None) -> PendingCall:
    """Starts a call. `issue` may block where it makes the communicator, and fail there when other ranks do not come."""
    began = time.monotonic()
    try:
        work = issue()
    except RuntimeError as error:
        raise failure(str(call), call.group, time.monotonic() - began, error) from error
    return PendingCall(work, call, finish)


def prepared(group: Group, transport: Transport, device: torch.device) -> None:
    """Makes a communicator ahead of its first use."""
    began = time.monotonic()
    try:
        transport.prepare(group, device)
    except RuntimeError as error:
        what = f"making the communicator over {', '.join(group.axes)} (use {group.use!r})"
        raise failure(what, group, time.monotonic() - began, error) from error


class PendingCall:
    """Waits for a transport's handle, finishes the call (copies out of a staging buffer), and turns failures into CommunicationError."""

    def __init__(self, work: Handle, call: Call, finish: Callable[[], None] | None = None) -> None:
        self._work: Handle | None = work
        self._call = call
        self._finish = finish
        self._started = time.monotonic()

    def wait(self) -> None:
        if self._work is None:
            return
        try:
            self._work.wait()
        except RuntimeError as error:
            raise failure(str(self._call), self._call.group, time.monotonic() - self._started, error) from error
        self._work = None
        if self._finish is not None:
            self._finish()
            self._finish = None

    def is_done(self) -> bool:
        return self._work is None or self._work.is_done()


class PolledWork:
    """A handle that cannot be asked whether it is done (gloo's point-to-point ones never are until somebody has waited): the first question
    starts a thread that waits. The thread ends with the transfer, at the latest after the backend's timeout.
    """

    def __init__(self, work: Handle) -> None:
        self._work: Handle | None = work
        self._error: RuntimeError | None = None
        self._waiter: threading.Thread | None = None

    def _wait(self, work: Handle) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            self._error = error

    def wait(self) -> None:
        if self._waiter is not None:
            # Of two threads that wait for one message, gloo wakes one.
            self._waiter.join()
        elif self._work is not None:
            self._work.wait()
        self._work = None
        if self._error is not None:
            raise self._error

    def is_done(self) -> bool:
        if self._waiter is None:
            if self._work is None:
                return True
            self._waiter = threading.Thread(
                target=self._wait, args=(self._work,), daemon=True, name="colossal transfer"
            )
            self._work = None
            self._waiter.start()
        return not self._waiter.is_alive() and self._error is None


class AllOf:
    """Several handles as one."""

    def __init__(self, handles: list[Handle]) -> None:
        self._handles = handles

    def wait(self) -> None:
        for handle in self._handles:
            handle.wait()

    def is_done(self) -> bool:
        return all(handle.is_done() for handle in self._handles)
