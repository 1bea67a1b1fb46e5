"""What the ranks of a pipeline do when, in one real step: marks on each rank's own time line, read after the step and put on one clock.

Within the step nothing waits: on a GPU a mark is an event on the stream, so that a span lasts from when the device comes to it until the
device is done with it, whatever the host is ahead. Nothing is recorded in any other step.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from colossal_core.program import Action
from colossal_pipeline.cutting import read
from colossal_pipeline.time_line import Span, TimeLine
from colossal_pipeline.trace import Trace, recorded_file

if TYPE_CHECKING:
    from colossal_core.plan import Plan
    from colossal_core.strategy import ApplyContext, StepView
    from colossal_pipeline.config import PipelineConfig

Gather = Callable[[bytes], Sequence[bytes]]
"""Every rank's bytes, in order of the ranks, on every rank: a rendezvous, that no rank leaves before every one has come."""
NUM_ROUNDS = 12
"""Rendezvous by which clocks are compared; the closest counts."""
NUM_ANCHORS = 5
"""Events whose time on the host's clock is taken; the closest counts."""


class Stopwatch:
    """Marks on the device's time line. Setting one never waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """When each mark was passed, on this host's `perf_counter`. Waits for the device."""
        if not self._cuda:
            return [float(mark) for mark in marks]
        torch.cuda.synchronize(self._device)
        _, at, anchor = min((self._anchor() for _ in range(NUM_ANCHORS)), key=lambda found: found[0])
        return [at - mark.elapsed_time(anchor) / 1e3 for mark in marks]

    def _anchor(self) -> tuple[float, float, Any]:
        """An event, when it was passed, and how long after its setting this was known; the device is idle."""
        before = time.perf_counter()
        event = self.mark()
        event.synchronize()
        after = time.perf_counter()
        return after - before, (before + after) / 2, event


@dataclass
class _Marks:
    action: Action
    start: Any
    end: Any


class StepRecorder:
    """The actions of one rank in one step, in their order. A receive lasts until its message is there, and what needed it begins then."""

    def __init__(self, device: torch.device) -> None:
        self._stopwatch = Stopwatch(device)
        self._marks: list[_Marks] = []

    def begin(self, action: Action) -> None:
        mark = self._stopwatch.mark()
        self._marks.append(_Marks(action, mark, mark))

    def arrived(self) -> None:
        mark = self._stopwatch.mark()
        self._marks[-1].start = mark
        if len(self._marks) > 1 and self._marks[-2].action.kind == "receive":
            self._marks[-2].end = mark

    def end(self) -> None:
        self._marks[-1].end = self._stopwatch.mark()

    def spans(self) -> tuple[Span, ...]:
        """On this host's clock. Waits for the device."""
        times = self._stopwatch.seconds([mark for marks in self._marks for mark in (marks.start, marks.end)])
        pairs = zip(self._marks, times[::2], times[1::2], strict=True)
        return tuple(Span(marks.action, start, end) for marks, start, end in pairs)


def on_one_clock(spans: Sequence[Span], gather: Gather) -> tuple[TimeLine, float]:
    """The time line of all ranks, and by how many seconds their clocks may be apart in it. Collective.

    Communication: a few bytes in each of `NUM_ROUNDS` rendezvous, then every rank's spans, as JSON.
    """
    meetings = _meetings(gather)
    own = [[str(span.action), span.start, span.end] for span in spans]
    told = [json.loads(data) for data in gather(json.dumps([meetings, own]).encode())]
    shifts = [_shift(told[0][0], other) for other, _ in told]
    lines = [
        [(action, start - shift, end - shift) for action, start, end in line]
        for (_, line), (shift, _) in zip(told, shifts, strict=True)
    ]
    return TimeLine.in_order(lines), max(error for _, error in shifts)


def _meetings(gather: Gather) -> list[tuple[float, float]]:
    """When this rank came to each rendezvous and when it left, on its own clock; without the first one, which makes connections."""
    found = []
    for _ in range(1 + NUM_ROUNDS):
        before = time.perf_counter()
        gather(b"clock")
        found.append((before, time.perf_counter()))
    return found[1:]


def _shift(first: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float, float]:
    """How far another rank's clock is ahead of the first one's, and how wrong that can be at most, in seconds.

    Nobody leaves a rendezvous before the other has come: that bounds the clocks' difference from both sides (Marzullo and Owicki 1983).
    """
    lowest = max(come - left for (_, left), (come, _) in zip(first, other, strict=True))
    highest = min(left - come for (come, _), (_, left) in zip(first, other, strict=True))
    return (0.0, 0.0) if first is other else ((lowest + highest) / 2, max(highest - lowest, 0.0) / 2)


def record_step(config: PipelineConfig, plan: Plan, context: ApplyContext) -> None:
    """Has the step recorded that the config names, and written by rank 0. Of ranks that differ in other axes than `pp` alone, those are
    recorded that stand with rank 0.

    Communication, after this step alone: that of `on_one_clock` over `pp`.
    """

    def before(view: StepView) -> None:
        wanted = view.step + 1 == config.record_step
        context.recorder = StepRecorder(context.device) if wanted else None

    def after(view: StepView) -> None:
        recorder, context.recorder = context.recorder, None
        if not isinstance(recorder, StepRecorder):
            return
        collectives = context.collectives
        line, error = on_one_clock(
            recorder.spans(), lambda data: collectives.gather_bytes(data, ("pp",), tag="time line")
        )
        path = recorded_file(plan)
        if collectives.rank == 0 and path is not None:
            program = plan.program
            ranks, counts = program.stage_ranks, read(plan).counts
            trace = Trace(config.schedule, view.step, program.num_microbatches, ranks, counts, error, line)
            try:
                trace.write(path)
            except OSError as error_of_file:  # what is trained is worth more than a picture
                warnings.warn(f"the recorded step could not be written: {error_of_file}", stacklevel=1)

    context.hooks.add("before_step", before)
    context.hooks.add("after_step", after)
