"""What every rank did when: simulated, or measured in a real run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from colossal_core.program import Action
from colossal_pipeline.checker import COMPUTED
from colossal_pipeline.schedule_files import parse_action


@dataclass(frozen=True)
class Span:
    """One action of one rank, from start to end in seconds. A receive lasts while the rank waits for it."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Idle:
    """What a rank idles in a step, in seconds. bubble: there is nothing to do yet, or any more. messages: what it waits for is made, and
    on its way. other: between its actions, while kernels are launched, and for reductions.
    """

    bubble: float
    messages: float
    other: float


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

    @classmethod
    def in_order(cls, lines: Sequence[Sequence[tuple[str, float, float]]]) -> TimeLine:
        """From (action, start, end) of each rank, in the order of its actions, all on one clock. Time starts with the first of them."""
        zero = min((start for line in lines for _, start, _ in line), default=0.0)
        return cls(
            tuple(
                tuple(Span(parse_action(action), start - zero, end - zero) for action, start, end in line)
                for line in lines
            )
        )

    def written(self) -> list[list[tuple[str, float, float]]]:
        """What `in_order` reads, to the microsecond and a tenth of it."""
        return [[(str(span.action), round(span.start, 7), round(span.end, 7)) for span in line] for line in self.ranks]

    def scaled(self, factor: float) -> TimeLine:
        """The same with every second `factor` seconds long."""
        return TimeLine(
            tuple(
                tuple(Span(span.action, factor * span.start, factor * span.end) for span in line) for line in self.ranks
            )
        )

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

    @cached_property
    def messages(self) -> tuple[tuple[tuple[float, float], ...], ...]:
        """For each rank when it waited for what had been sent already: (start, end) of each such wait."""
        sent = {
            (span.action.peer_stage, span.action.stage, span.action.microbatch): span.start
            for line in self.ranks
            for span in line
            if span.action.kind == "send"
        }
        return tuple(tuple(_under_way(line, sent)) for line in self.ranks)

    @property
    def idle(self) -> tuple[Idle, ...]:
        """For each rank, what its idle time is made of: the three add up to `idle_seconds`."""
        return tuple(
            self._idle_of(line, idle, sum(end - start for start, end in waits))
            for line, idle, waits in zip(self.ranks, self.idle_seconds, self.messages, strict=True)
        )

    def _idle_of(self, line: tuple[Span, ...], idle: float, messages: float) -> Idle:
        waits = sum(span.end - span.start for span in line if span.action.kind == "receive")
        first, last = (line[0].start, line[-1].end) if line else (0.0, 0.0)
        bubble = first + waits - messages + self.makespan - last
        return Idle(bubble, messages, idle - bubble - messages)


def _work(line: tuple[Span, ...]) -> list[Span]:
    return [span for span in line if span.action.kind in COMPUTED]


def _under_way(line: tuple[Span, ...], sent: dict[tuple[int, int, int], float]) -> Iterable[tuple[float, float]]:
    for span in line:
        if span.action.kind == "receive":
            there = sent.get((span.action.stage, span.action.peer_stage, span.action.microbatch), span.end)
            start = min(max(there, span.start), span.end)
            if span.end > start:
                yield start, span.end
