"""What every rank did when: simulated, or measured in a real run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from colossal_core.program import Action
from colossal_pipeline.checker import COMPUTED


@dataclass(frozen=True)
class Span:
    """One action of one rank, from start to end in seconds. A receive lasts while the rank waits for it."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class TimeLine:
    """`ranks[r]` is what rank r did, in order. Only `F`, `B`, `I` and `W` count as work; all other time is idle."""

    ranks: tuple[tuple[Span, ...], ...]

    @classmethod
    def measured(cls, spans: Iterable[tuple[int, Action, float, float]]) -> TimeLine:
        """From (rank, action, start, end) in any order, all on one clock. Time starts with the first of them."""
        found = sorted(spans, key=lambda span: (span[2], span[3]))
        zero = found[0][2] if found else 0.0
        lines: list[list[Span]] = [[] for _ in range(1 + max((span[0] for span in found), default=-1))]
        for rank, action, start, end in found:
            lines[rank].append(Span(action, start - zero, end - zero))
        return cls(tuple(map(tuple, lines)))

    @cached_property
    def makespan(self) -> float:
        """Seconds from 0 until the last action ends."""
        return max((span.end for line in self.ranks for span in line), default=0.0)

    @cached_property
    def busy_seconds(self) -> tuple[float, ...]:
        """For each rank, how long it computes."""
        return tuple(sum(span.end - span.start for span in line) for line in map(_work, self.ranks))

    @property
    def idle_seconds(self) -> tuple[float, ...]:
        """For each rank, how much of the makespan it does not compute."""
        return tuple(self.makespan - busy for busy in self.busy_seconds)

    @property
    def bubble_fraction(self) -> float:
        """Part of all ranks' time that is idle, from 0 to 1, where a step begins and ends at one time on all ranks."""
        total = self.makespan * len(self.ranks)
        return sum(self.idle_seconds) / total if total else 0.0

    @property
    def bubble_seconds(self) -> float:
        """The bubble as the zero-bubble papers count it: the longest time that a rank idles between its own first and last action. What a
        rank waits for its first input, and for others after its end, is left out, because the next step can fill it.
        """
        inside = [
            line[-1].end - line[0].start - busy
            for line, busy in zip(map(_work, self.ranks), self.busy_seconds, strict=True)
            if line
        ]
        return max(inside, default=0.0)


def _work(line: tuple[Span, ...]) -> list[Span]:
    return [span for span in line if span.action.kind in COMPUTED]
