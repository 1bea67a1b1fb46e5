"""A collective on its way, and what is said when it fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from colossal_core.errors import CommunicationError

if TYPE_CHECKING:
    from colossal_comm.transport import Call
    from colossal_core.collectives import Handle


def failure(call: Call, seconds: float, error: BaseException) -> CommunicationError:
    """The error for a collective that the backend gave up: which call, among whom, after how long, and what to do."""
    ranks = ", ".join(str(rank) for rank in call.group.ranks)
    own = call.group.ranks[call.group.index]
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CommunicationError(
        f"{call} failed on rank {own} after {seconds:.1f} s, among ranks {ranks}: {reason}: "
        "a rank has died or hangs, so look at the first failing rank's own message; COLOSSAL_DEBUG_COLLECTIVES=1 names the rank that never "
        "arrived; raise the timeout if it was only slow"
    )


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
            raise failure(self._call, time.monotonic() - self._started, error) from error
        self._work = None
        if self._finish is not None:
            self._finish()
            self._finish = None

    def is_done(self) -> bool:
        return self._work is None or self._work.is_done()


class AllOf:
    """Several handles as one."""

    def __init__(self, handles: list[Handle]) -> None:
        self._handles = handles

    def wait(self) -> None:
        for handle in self._handles:
            handle.wait()

    def is_done(self) -> bool:
        return all(handle.is_done() for handle in self._handles)
