"""Recorded steps: marks, clocks, files, and what idle time is made of."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from colossal_core.errors import ConfigError
from colossal_core.program import Action
from colossal_pipeline import recorder as recorder_module
from colossal_pipeline.recorder import StepRecorder, on_one_clock
from colossal_pipeline.schedule_files import parse_action
from colossal_pipeline.schedules.registry import SCHEDULES
from colossal_pipeline.simulator import simulate
from colossal_pipeline.stage_costs import Costs, StageCosts
from colossal_pipeline.time_line import Idle, Span, TimeLine
from colossal_pipeline.trace import Trace, measured_costs

AHEAD = 1000.0
"""Seconds by which the second rank's clock is ahead."""
FIRST = [("F0.0", 1.0, 2.0), ("S0>1.0", 2.0, 2.0), ("V0<1.0", 2.0, 7.0), ("B0.0", 7.0, 9.0), ("R0", 9.0, 9.5)]
SECOND = [("V1<0.0", 1.0, 2.5), ("F1.0", 2.5, 4.0), ("B1.0", 4.25, 6.0), ("S1>0.0", 6.0, 6.0), ("R1", 6.0, 6.0)]


def test_a_receive_lasts_until_its_message_is_there() -> None:
    told = StepRecorder(torch.device("cpu"))
    for text in ("V1<0.0", "F1.0", "B1.0", "S1>0.0", "R1"):
        told.begin(parse_action(text))
        if text == "F1.0":
            time.sleep(0.01)
            told.arrived()
        told.end()
    told.end()
    spans = told.spans()
    assert [str(span.action) for span in spans] == ["V1<0.0", "F1.0", "B1.0", "S1>0.0", "R1"]
    assert spans[0].end - spans[0].start >= 0.01 and spans[0].end == spans[1].start
    assert all(one.end <= other.start for one, other in pairwise(spans))


class Meeting:
    """The bytes of two threads, given to both when both have come."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)
        self._data = [b"", b""]

    def of(self, rank: int) -> Callable[[bytes], Sequence[bytes]]:
        def gather(data: bytes) -> Sequence[bytes]:
            self._data[rank] = data
            self._barrier.wait()
            found = list(self._data)
            self._barrier.wait()
            return found

        return gather


class OwnClocks:
    """What each thread reads on its clock."""

    def __init__(self) -> None:
        self.ahead = threading.local()

    def perf_counter(self) -> float:
        return time.perf_counter() + float(getattr(self.ahead, "seconds", 0.0))


def test_clocks_are_compared_at_meetings(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, meeting = OwnClocks(), Meeting()
    monkeypatch.setattr(recorder_module, "time", clocks)
    found: list[tuple[TimeLine, float] | None] = [None, None]

    def rank(number: int) -> None:
        clocks.ahead.seconds = number * AHEAD
        now = clocks.perf_counter()
        found[number] = on_one_clock([Span(Action("forward", number, 0), now, now + 1)], meeting.of(number))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is not None and found[0] == found[1]
    line, error = found[0]
    assert 0 < error < 0.1
    assert max(spans[0].start for spans in line.ranks) < 1.0, "the second rank's clock is not taken back"


def test_what_idle_time_is_made_of() -> None:
    line = TimeLine.in_order([FIRST, SECOND])
    assert line.makespan == 8.5 and line.idle_seconds == (5.5, 5.25)
    assert line.messages == (((5.0, 6.0),), ((1.0, 1.5),))
    assert line.idle == (Idle(4.0, 1.0, 0.5), Idle(1.0 + 3.5, 0.5, 0.25))
    assert line.scaled(2.0).idle[0] == Idle(8.0, 2.0, 1.0)
    program = SCHEDULES["zbv"].generate(4, 2, 8)
    for idle, whole in zip(
        (free := simulate(program, Costs.alike(8))).idle, free.idle_seconds, strict=True
    ):  # nothing but work and waiting for it
        assert (idle.bubble, idle.messages, idle.other) == pytest.approx((whole, 0.0, 0.0))
    late = simulate(program, Costs.alike(8, link_seconds=0.25))
    assert sum(idle.messages for idle in late.idle) > 0
    assert [idle.other for idle in late.idle] == pytest.approx([0.0] * 4)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    trace = Trace("1f1b", 7, 1, (0, 1), (3, 2), 2e-5, TimeLine.in_order([FIRST, SECOND]))
    path = tmp_path / "folder" / "step.json"
    trace.write(path)
    assert Trace.read(path) == trace
    assert path.read_text().splitlines()[1] == '["F0.0", 0.0, 1.0],'
    assert trace.costs() == Costs((StageCosts(1.0, 0.0, 0.0, 2.0), StageCosts(1.5, 0.0, 0.0, 1.75)))


def recorded(blocks: tuple[int, ...], seconds: tuple[float, ...]) -> Trace:
    """One microbatch through a stage a rank; seconds: of each one's forward and backward pass together."""
    lines = [
        [(f"F{stage}.0", 0.0, taken / 4), (f"B{stage}.0", taken / 4, taken)] for stage, taken in enumerate(seconds)
    ]
    return Trace("1f1b", 1, 1, tuple(range(len(blocks))), blocks, 0.0, TimeLine.in_order(lines))


@pytest.mark.parametrize(
    ("blocks", "seconds", "costs"),
    [
        ((2, 2), (4.0, 7.0), [2.0, 2.0, 2.0, 5.0]),  # a head that takes 3 s, estimated at nothing
        ((1, 3), (3.0, 6.0), [3.0, 2.0, 2.0, 2.0]),  # a first block with what stands before it
        ((1, 2, 1), (2.0, 6.0, 5.0), [2.0, 3.0, 3.0, 5.0]),  # the middle says what a block takes; the first is faster
        ((2, 2), (0.0, 0.0), [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_what_a_block_takes_follows_from_what_stages_took(
    blocks: tuple[int, ...], seconds: tuple[float, ...], costs: list[float]
) -> None:
    found = measured_costs(recorded(blocks, seconds), [10.0] * 4)
    assert found == pytest.approx(costs)
    stops = [0, *itertools.accumulate(blocks)]
    assert [sum(found[a:b]) for a, b in itertools.pairwise(stops)] == pytest.approx(list(seconds))


def test_blocks_of_different_sizes_and_of_none() -> None:
    trace = recorded((2, 2), (6.0, 6.0))
    assert measured_costs(trace, [1.0, 2.0, 1.0, 2.0]) == pytest.approx([2.0, 4.0, 2.0, 4.0])
    assert measured_costs(trace, [0.0] * 4) == pytest.approx([3.0] * 4)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "TypeError: list indices must be integers or slices, not str"),
        ("{}", "KeyError: 'format'"),
        ('{"format": "other"}', "ValueError: its format is 'other'"),
        (
            '{"format": "colossal pipeline step 1", "schedule": "1f1b", "step": 1, "num_microbatches": 1, '
            '"stage_ranks": [0, 1], "blocks": [4]}',
            "ValueError: zip() argument 2 is longer than argument 1",
        ),
        ("F0.0", "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_files_that_are_no_recorded_step(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Trace.read(path)
    assert str(caught.value) == (
        f"parallel.pipeline.record_step: {path} holds no recorded step ({why}): record it anew, or leave it out"
    )
