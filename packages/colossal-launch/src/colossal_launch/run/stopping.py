"""Ctrl-C and SIGTERM: the run stops at a step that all ranks agree on, saves, and leaves nothing behind."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopRequest:
    """Remembers the first SIGINT or SIGTERM while it is installed; a second one ends the process at once. A context manager."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in EXIT_STATUS:
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _received(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is not None:
            raise SystemExit(EXIT_STATUS[signal.Signals(number)])
        self.signal = signal.Signals(number)

    @property
    def exit_status(self) -> int:
        """130 after SIGINT, 143 after SIGTERM or when another rank was asked to stop, which is how the launcher passes it on."""
        return EXIT_STATUS[self.signal or signal.SIGTERM]
