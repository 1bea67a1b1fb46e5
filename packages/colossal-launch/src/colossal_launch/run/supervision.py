"""How workers end: all by themselves, all together after a signal with time to save, or at once when one of them has failed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException

from colossal_launch.run.stopping import SAME_SIGNAL_SECONDS, STOP_SIGNALS, STOPPED, show_cursor

MISSED_SECONDS = 2.0
"""From the first failure to SIGTERM for the others, who miss it in a collective and say so by themselves."""
FAILURE_GRACE_SECONDS = 5.0
"""From the first failure to SIGKILL for them."""
STOP_GRACE_SECONDS = 30.0
"""After a signal: from the first worker that has saved and left to SIGKILL for those who have not."""
_LOOK_SECONDS = 0.05

Workers = Mapping[int, "subprocess.Popen[Any]"]


class WorkerSupervisor:
    """Ends the workers of one host. A context manager: outside of it the process has its own signal handlers again.

    signal: what stopped the run; None while nothing did. A second signal kills the workers. codes: exit statuses as they were before
    anything was sent to the other workers, by local rank.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.codes: dict[int, int] = {}
        self._since = 0.0
        self._kill = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> WorkerSupervisor:
        self._before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGQUIT)}
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def started(self) -> None:
        """Takes the place of torch's handlers. What was ignored before (SIGHUP under nohup) is ignored again."""
        for number, handler in self._before.items():
            ignored = handler is signal.SIG_IGN
            signal.signal(number, signal.SIG_IGN if ignored else self._received)

    def _received(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = number, now
            raise SignalException(f"received signal {number}", signal.Signals(number))
        if now - self._since >= SAME_SIGNAL_SECONDS:
            self._kill = True

    def look(self, workers: Workers) -> None:
        codes = _exit_codes(workers)
        if any(codes.values()):
            self.codes = codes
            if set(codes.values()) <= {0, *STOPPED}:
                self._wait(workers, STOP_GRACE_SECONDS)
            else:
                self._wait(workers, MISSED_SECONDS)
            self._end_all(workers, FAILURE_GRACE_SECONDS - MISSED_SECONDS)

    def end(self, workers: Workers, number: int | None) -> None:
        # torch's own handlers stand for a moment before `started` replaces them.
        self.signal = self.signal if self.signal is not None else number
        if self.signal is not None and _running(workers):
            _send(workers, self.signal if self.signal in STOP_SIGNALS else signal.SIGTERM)
            while _running(workers) and not self._kill:
                codes = _exit_codes(workers)
                if codes:
                    self.codes = codes
                    stopped = set(codes.values()) <= {0, *STOPPED, -self.signal}
                    self._wait(workers, STOP_GRACE_SECONDS if stopped else FAILURE_GRACE_SECONDS)
                    break
                time.sleep(_LOOK_SECONDS)
            self._kill_all(workers)
        elif _running(workers):
            self._end_all(workers, FAILURE_GRACE_SECONDS)
        self.codes = self.codes or _exit_codes(workers)

    def _wait(self, workers: Workers, seconds: float) -> None:
        end = time.monotonic() + seconds
        while _running(workers) and not self._kill and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)

    def _end_all(self, workers: Workers, seconds: float) -> None:
        _send(workers, signal.SIGTERM)
        self._wait(workers, seconds)
        self._kill_all(workers)

    @staticmethod
    def _kill_all(workers: Workers) -> None:
        running = _running(workers)
        _send(workers, signal.SIGKILL)
        for process in running:
            process.wait()
        if running:
            show_cursor()


def _exit_codes(workers: Workers) -> dict[int, int]:
    """Of those that have ended."""
    codes = {local_rank: process.poll() for local_rank, process in workers.items()}
    return {local_rank: code for local_rank, code in codes.items() if code is not None}


def _running(workers: Workers) -> list[subprocess.Popen[Any]]:
    return [process for process in workers.values() if process.poll() is None]


def _send(workers: Workers, number: int) -> None:
    """To the running workers and their own children: torch starts each worker as the leader of a session."""
    for process in _running(workers):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            continue
