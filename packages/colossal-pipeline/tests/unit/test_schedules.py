"""Every generator, for any numbers of ranks, chunks and microbatches: proven by the checker, and as its paper says."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_core.program import Action, Program
from colossal_pipeline.checker import peak_activations, problems_of
from colossal_pipeline.schedules.messages import program_of
from colossal_pipeline.schedules.orders import backward, forward
from colossal_pipeline.schedules.registry import SCHEDULES, ScheduleSpec
from colossal_pipeline.simulator import simulate
from colossal_pipeline.stage_costs import Costs, StageCosts

quarters = st.integers(1, 8).map(lambda number: number / 4)  # sums of them are exact


def chunks_of(spec: ScheduleSpec, num_ranks: int) -> list[int]:
    most = min(spec.max_chunks or 4, 32 // num_ranks)
    return list(range(spec.min_chunks, most + 1))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[ScheduleSpec, int, int, int]:
    spec = SCHEDULES[draw(st.sampled_from(list(SCHEDULES)))]
    num_ranks = draw(st.integers(1, 8))
    return spec, num_ranks, draw(st.sampled_from(chunks_of(spec, num_ranks))), draw(st.integers(1, 32))


def text_of(program: Program) -> list[str]:
    return [" ".join(map(str, order)) for order in program.actions]


@settings(deadline=None, max_examples=200)
@given(shapes())
def test_any_program_is_proven(shape: tuple[ScheduleSpec, int, int, int]) -> None:
    spec, num_ranks, num_chunks, num_microbatches = shape
    program = spec.generate(num_ranks, num_chunks, num_microbatches)
    assert problems_of(program) == []
    assert program.num_microbatches == num_microbatches
    assert program.stage_ranks == spec.stage_ranks(num_ranks, num_chunks)
    assert len(program.actions) == num_ranks
    split = {action.kind for order in program.actions for action in order} & {"backward_input", "backward_weight"}
    assert not split or spec.splits_backward


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_and_four_ranks_with_up_to_three_microbatches_a_rank(name: str) -> None:
    spec = SCHEDULES[name]
    for num_ranks in (2, 4):
        for num_microbatches in range(1, 3 * num_ranks + 1):
            program = spec.generate(num_ranks, spec.min_chunks, num_microbatches)
            assert problems_of(program) == [], (num_ranks, num_microbatches)


@settings(deadline=None, max_examples=300)
@given(shapes(), quarters, quarters, quarters, st.booleans())
def test_idle_time_and_activations_are_the_closed_form(
    shape: tuple[ScheduleSpec, int, int, int], first: float, second: float, third: float, equal: bool
) -> None:
    spec, num_ranks, num_chunks, num_microbatches = shape
    stage = StageCosts(first, first, first) if equal else StageCosts(first, second, third)
    form = spec.closed_form(num_ranks, num_chunks, num_microbatches, stage)
    if form is None:
        assert spec.splits_backward
        assert not equal or num_microbatches < 2 * num_ranks
        return
    program = spec.generate(num_ranks, num_chunks, num_microbatches)
    line = simulate(program, Costs.alike(program.num_stages, stage))
    assert line.bubble_seconds == form.bubble_seconds
    assert line.idle_seconds == (form.idle_seconds,) * num_ranks
    assert line.busy_seconds == (form.busy_seconds,) * num_ranks
    assert line.bubble_fraction == pytest.approx(form.bubble_fraction, abs=1e-14)
    assert peak_activations(program) == form.peak_activations


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_fractions_that_papers_print(num_ranks: int) -> None:
    p, m, unit = num_ranks, 4 * num_ranks, StageCosts()
    fractions = {
        "gpipe": (p - 1) / (m + p - 1),
        "1f1b": (p - 1) / (m + p - 1),
        "interleaved": (p - 1) / (2 * m + p - 1),
        "looped-bfs": (p - 1) / (2 * m + p - 1),
        "zb-h1": (p - 1) / (3 * m + p - 1),
        "zb-h2": (p - 1) / (3 * m + p - 1),
        "zbv": (p - 1) / (6 * m + p - 1),
        "dualpipev": (p - 1) / (6 * m + p - 1),
    }
    bubbles = {}
    for name, spec in SCHEDULES.items():
        program = spec.generate(p, spec.min_chunks, m)
        line = simulate(program, Costs.alike(program.num_stages, unit))
        assert line.bubble_fraction == pytest.approx(fractions[name], abs=1e-14), name
        bubbles[name] = line.bubble_seconds
    assert bubbles["zb-h1"] == p - 1
    assert bubbles["zb-h2"] == bubbles["zbv"] == 0


@pytest.mark.parametrize("num_ranks", range(2, 9))
def test_dualpipev_idles_less_than_its_authors_say(num_ranks: int) -> None:
    stage = StageCosts(2.5, 2.0, 1.5)
    line = simulate(SCHEDULES["dualpipev"].generate(num_ranks, 2, 3 * num_ranks), Costs.alike(2 * num_ranks, stage))
    together = stage.forward + stage.whole_backward
    of_authors = (num_ranks - 1) * (together + stage.whole_backward - 3 * stage.backward_weight)
    assert line.bubble_seconds == of_authors - (num_ranks - 1) * stage.backward_input


@settings(deadline=None, max_examples=60)
@given(shapes())
def test_fewer_microbatches_hold_no_more(shape: tuple[ScheduleSpec, int, int, int]) -> None:
    spec, num_ranks, num_chunks, num_microbatches = shape
    if spec.name == "interleaved" and num_microbatches % num_ranks:
        return  # its groups are larger there, so that it does not idle longer
    fewer = peak_activations(spec.generate(num_ranks, num_chunks, max(1, num_microbatches - num_ranks)))
    more = peak_activations(spec.generate(num_ranks, num_chunks, num_microbatches))
    assert all(few <= many for few, many in zip(fewer, more, strict=True))


def test_1f1b_in_words() -> None:
    assert text_of(SCHEDULES["1f1b"].generate(2, 1, 3)) == [
        "F0.0 S0>1.0 F0.1 S0>1.1 V0<1.0 B0.0 F0.2 S0>1.2 V0<1.1 B0.1 V0<1.2 B0.2 R0",
        "V1<0.0 F1.0 B1.0 S1>0.0 V1<0.1 F1.1 B1.1 S1>0.1 V1<0.2 F1.2 B1.2 S1>0.2 R1",
    ]


def test_zbv_in_words() -> None:
    assert text_of(SCHEDULES["zbv"].generate(2, 2, 1)) == [
        "F0.0 S0>1.0 V3<2.0 F3.0 I3.0 S3>2.0 W3.0 V0<1.0 I0.0 W0.0 R3 R0",
        "V1<0.0 F1.0 F2.0 S2>3.0 V2<3.0 I2.0 W2.0 I1.0 S1>0.0 W1.0 R2 R1",
    ]


def test_one_rank_sends_nothing() -> None:
    assert text_of(SCHEDULES["interleaved"].generate(1, 2, 2)) == ["F0.0 F1.0 B1.0 F0.1 B0.0 F1.1 B1.1 B0.1 R1 R0"]


def test_messages_are_received_in_the_order_of_sending() -> None:
    # Stages 0 and 2 are on rank 0, 1 and 3 on rank 1. Rank 1 wants stage 3's tensor of microbatch 0 after stage 1's of microbatch 1.
    first = [forward(0, 0), forward(2, 0), forward(0, 1), forward(2, 1)]
    second = [forward(1, 0), forward(1, 1), forward(3, 0), forward(3, 1)]
    behind = [
        [backward(2, 0), backward(0, 0), backward(2, 1), backward(0, 1)],
        [backward(3, 0), backward(1, 0), backward(3, 1), backward(1, 1)],
    ]
    program = program_of(2, (0, 1, 0, 1), [first + behind[0], second + behind[1]])
    taken = [
        str(action) for action in program.actions[1] if action.kind == "receive" and action.carries == "activations"
    ]
    assert taken == ["V1<0.0", "V3<2.0", "V1<0.1", "V3<2.1"]
    assert problems_of(program) == []


def test_numbers_of_chunks() -> None:
    field = "parallel.pipeline.chunks"
    assert [str(problem) for problem in SCHEDULES["1f1b"].problems(field, 2)] == [
        "parallel.pipeline.chunks=2: schedule 1f1b has 1 stage on each rank: give 1, or choose a schedule that takes 2 "
        "(interleaved, looped-bfs, zbv, dualpipev)"
    ]
    assert [str(problem) for problem in SCHEDULES["zbv"].problems(field, 3)] == [
        "parallel.pipeline.chunks=3: schedule zbv has 2 stages on each rank: give 2, or choose a schedule that takes 3 "
        "(interleaved, looped-bfs)"
    ]
    assert [str(problem) for problem in SCHEDULES["interleaved"].problems(field, 1)] == [
        "parallel.pipeline.chunks=1: schedule interleaved has 2 or more stages on each rank: give 2 or more, or choose "
        "a schedule that takes 1 (gpipe, 1f1b, zb-h1, zb-h2)"
    ]
    assert [spec.problems(field, spec.min_chunks) for spec in SCHEDULES.values()] == [[]] * len(SCHEDULES)


def test_reductions_end_every_list() -> None:
    for spec in SCHEDULES.values():
        program = spec.generate(4, spec.min_chunks, 6)
        for rank, order in enumerate(program.actions):
            stages = program.stages_of(rank)
            assert set(order[-len(stages) :]) == {Action("reduce", stage) for stage in stages}


def test_schedules_are_data_that_need_no_torch() -> None:
    code = (
        "import sys, colossal_pipeline as package; program = package.SCHEDULES['zbv'].generate(2, 2, 4); "
        "line = package.simulate(program, package.Costs.alike(4)); assert not package.problems_of(program); "
        "package.draw_text(line); assert not {'torch', 'matplotlib', 'pydantic', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
