"""Ctrl-C and SIGTERM: the run stops at a step that all ranks agree on, saves, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What stops a run: Ctrl-C, a scheduler or `kill`, and a terminal that closes (unless it is ignored, as under nohup)."""

SAME_SIGNAL_SECONDS = 1.0
"""Signals that come within this time are one: some launchers send the same one to a process and again to its group."""


def exit_status(number: int) -> int:
    """What a shell reports for a process that a signal ended: 130 after SIGINT, 143 after SIGTERM."""
    return 128 + number


STOPPED = frozenset(exit_status(number) for number in STOP_SIGNALS)


class StopRequest:
    """Remembers the first of the stop signals while it is installed; a second one ends the process at once. A context manager."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _received(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = number, now
        elif now - self._since >= SAME_SIGNAL_SECONDS:
            show_cursor()
            os._exit(exit_status(number))

    @property
    def exit_status(self) -> int:
        """That of the signal; of SIGTERM where another rank was asked to stop, and not this one."""
        return exit_status(self.signal or signal.SIGTERM)


def show_cursor() -> None:
    """Makes a terminal's cursor visible again: a progress line hides it, and a process that is ended at once cannot."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")
        sys.stdout.flush()
