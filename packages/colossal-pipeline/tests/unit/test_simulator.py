"""The simulator against time lines that can be counted by hand, and its bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_core.program import Action, Program
from colossal_pipeline.checker import COMPUTED, peak_activations
from colossal_pipeline.schedules.registry import SCHEDULES
from colossal_pipeline.simulator import peak_bytes, simulate
from colossal_pipeline.stage_costs import Costs, StageCosts
from colossal_pipeline.time_line import Span, TimeLine

ProgramFrom = Callable[..., Program]
quarters = st.integers(1, 8).map(lambda number: number / 4)


def times_of(line: TimeLine, rank: int) -> list[tuple[str, float, float]]:
    return [(str(span.action), span.start, span.end) for span in line.ranks[rank]]


def test_two_ranks_by_hand() -> None:
    first, second = StageCosts(1.0, backward=3.0), StageCosts(2.0, 2.5, 1.5)
    line = simulate(SCHEDULES["1f1b"].generate(2, 1, 2), Costs((first, second), link_seconds=0.5))
    assert times_of(line, 0) == [
        ("F0.0", 0.0, 1.0), ("S0>1.0", 1.0, 1.0), ("F0.1", 1.0, 2.0), ("S0>1.1", 2.0, 2.0),
        ("V0<1.0", 2.0, 8.0), ("B0.0", 8.0, 11.0), ("V0<1.1", 11.0, 14.0), ("B0.1", 14.0, 17.0), ("R0", 17.0, 17.0),
    ]  # fmt: skip
    assert times_of(line, 1) == [
        ("V1<0.0", 0.0, 1.5), ("F1.0", 1.5, 3.5), ("B1.0", 3.5, 7.5), ("S1>0.0", 7.5, 7.5),
        ("V1<0.1", 7.5, 7.5), ("F1.1", 7.5, 9.5), ("B1.1", 9.5, 13.5), ("S1>0.1", 13.5, 13.5), ("R1", 13.5, 13.5),
    ]  # fmt: skip
    assert line.makespan == 17.0
    assert line.busy_seconds == (8.0, 12.0)
    assert line.idle_seconds == (9.0, 5.0)
    assert line.bubble_fraction == 14.0 / 34.0
    assert line.bubble_seconds == 9.0


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 5), st.integers(1, 12), st.data())
def test_any_costs(name: str, num_ranks: int, num_microbatches: int, data: st.DataObject) -> None:
    spec = SCHEDULES[name]
    program = spec.generate(num_ranks, spec.min_chunks, num_microbatches)
    stages = tuple(data.draw(st.builds(StageCosts, quarters, quarters, quarters)) for _ in program.stage_ranks)
    costs = Costs(stages, data.draw(quarters))
    line = simulate(program, costs)
    begins, ends = ({span.action: getattr(span, end) for row in line.ranks for span in row} for end in ("start", "end"))
    for order, row in zip(program.actions, line.ranks, strict=True):
        assert tuple(span.action for span in row) == order
        assert all(one.end <= other.start for one, other in itertools.pairwise(row))
        for span in row:
            if span.action.kind in COMPUTED:
                assert span.end - span.start == stages[span.action.stage].seconds(span.action)
            if span.action.kind == "receive":
                action = span.action
                sent = Action("send", action.peer_stage, action.microbatch, "", action.stage)
                assert ends[action] == max(begins[action], ends[sent] + costs.link_seconds)
    # One microbatch goes through all stages and back, and every rank does its own work.
    there_and_back = sum(stage.forward + stage.backward_input for stage in stages)
    assert line.makespan >= max(there_and_back, *line.busy_seconds)
    assert 0.0 <= line.bubble_fraction < 1.0
    assert 0.0 <= line.bubble_seconds <= max(line.idle_seconds)


def test_slower_links_never_shorten_a_step() -> None:
    for spec in SCHEDULES.values():
        program = spec.generate(4, spec.min_chunks, 8)
        spans = [simulate(program, Costs.alike(program.num_stages, None, link)).makespan for link in (0.0, 0.1, 1.0)]
        assert spans == sorted(spans)
        assert spans[0] < spans[2]


def test_bytes(program_from: ProgramFrom) -> None:
    program = program_from(2, (0,), "F0.0 F0.1 I0.0 I0.1 W0.0 W0.1 R0")
    assert peak_bytes(program, Costs((StageCosts(activation_bytes=100),))) == (200,)
    program = program_from(3, (0,), "F0.0 I0.0 F0.1 I0.1 F0.2 B0.2 W0.0 W0.1 R0")
    assert peak_bytes(program, Costs((StageCosts(activation_bytes=100),))) == (300,)
    assert peak_bytes(program, Costs((StageCosts(activation_bytes=100, weight_part_bytes=30),))) == (160,)


@pytest.mark.parametrize("name", SCHEDULES)
def test_bytes_of_equal_stages_are_activations(name: str) -> None:
    program = SCHEDULES[name].generate(4, SCHEDULES[name].min_chunks, 9)
    costs = Costs.alike(program.num_stages, StageCosts(activation_bytes=7))
    assert peak_bytes(program, costs) == tuple(7 * peak for peak in peak_activations(program))


def test_measured_on_a_clock_of_its_own() -> None:
    forward, backward = Action("forward", 0, 0), Action("backward", 0, 0)
    line = TimeLine.measured([(1, backward, 104.0, 106.0), (0, forward, 101.0, 102.0), (1, forward, 102.0, 103.0)])
    assert line.ranks == ((Span(forward, 0.0, 1.0),), (Span(forward, 1.0, 2.0), Span(backward, 3.0, 5.0)))
    assert (line.makespan, line.busy_seconds, line.idle_seconds) == (5.0, (1.0, 3.0), (4.0, 2.0))
    assert line.bubble_fraction == 0.6
    assert line.bubble_seconds == 1.0
    empty = TimeLine.measured([])
    assert (empty.makespan, empty.bubble_fraction, empty.bubble_seconds) == (0.0, 0.0, 0.0)


def test_a_program_that_never_ends(program_from: ProgramFrom) -> None:
    program = program_from(1, (0, 1), "V0<1.0 B0.0", "V1<0.0 F1.0")
    with pytest.raises(AssertionError) as caught:
        simulate(program, Costs.alike(2))
    assert str(caught.value) == "a program is checked before it is simulated, and this one never ends"
    with pytest.raises(AssertionError) as caught:
        simulate(program, Costs.alike(3))
    assert str(caught.value) == "3 costs for 2 stages"
