"""The line that a run shows while it trains: one that is redrawn on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

_PLAIN_SECONDS = 10.0
_SMOOTHING = 0.9


@dataclass(frozen=True)
class StepReport:
    """The numbers of one step for the line. memory_bytes: peak of this rank's device (0: not known). mfu: None where there is no peak.
    skipped_steps: updates left out so far.
    """

    step: int
    loss: float
    num_tokens: int
    seconds: float
    memory_bytes: int = 0
    mfu: float | None = None
    skipped_steps: int = 0


class ProgressLine:
    """Shows step, loss, tokens/s, MFU on a GPU, memory and time left. A context manager; one process of the run has one.

    On a terminal one line is redrawn; elsewhere a plain line comes at most every ten seconds, and for the first and the last step.
    Tokens/s and time left are smoothed over about ten steps; the first step (it warms up) does not count.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        first_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console

        self._console: Console = Console(file=stream, highlight=False, soft_wrap=True)
        self._num_steps = num_steps
        self._first_step = first_step
        self._clock = clock
        self._last_shown = float("-inf")
        self._seconds_per_step: float | None = None
        self._tokens_per_second: float | None = None
        self._live: Live | None = None

    def __enter__(self) -> ProgressLine:
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, report: StepReport) -> None:
        """Takes the numbers of a step; draws them where it is time to."""
        self._smooth(report)
        line = self._text(report)
        if self._live is not None:
            self._live.update(line, refresh=True)
            return
        now = self._clock()
        ends = report.step in (self._first_step + 1, self._num_steps)
        if ends or now - self._last_shown >= _PLAIN_SECONDS:
            self._console.print(line, markup=False)
            self._last_shown = now

    def note(self, text: str) -> None:
        """Prints a line that stays: an evaluation, a checkpoint."""
        self._console.print(text, markup=False)

    def _smooth(self, report: StepReport) -> None:
        rate = report.num_tokens / report.seconds if report.seconds > 0 else 0.0
        if report.step <= self._first_step + 2 or self._seconds_per_step is None or self._tokens_per_second is None:
            self._seconds_per_step, self._tokens_per_second = report.seconds, rate
            return
        self._seconds_per_step = _SMOOTHING * self._seconds_per_step + (1 - _SMOOTHING) * report.seconds
        self._tokens_per_second = _SMOOTHING * self._tokens_per_second + (1 - _SMOOTHING) * rate

    def _text(self, report: StepReport) -> str:
        assert self._seconds_per_step is not None and self._tokens_per_second is not None
        parts = [
            f"step {report.step}/{self._num_steps}",
            f"loss {report.loss:.4f}",
            f"{self._tokens_per_second:,.0f} tokens/s",
        ]
        if report.mfu is not None:
            parts.append(f"MFU {report.mfu:.1%}")
        if report.memory_bytes:
            parts.append(f"{report.memory_bytes / 2**30:.1f} GiB")
        if report.skipped_steps:
            parts.append(f"{report.skipped_steps} skipped")
        left = (self._num_steps - report.step) * self._seconds_per_step
        parts.append(f"{duration(left)} left")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
