"""The checker: refuses every mutant of a right program, and says what is wrong."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_core.program import Action, Program
from colossal_pipeline.checker import compute_problems_of, peak_activations, problems_of
from colossal_pipeline.schedules.registry import SCHEDULES

ProgramFrom = Callable[..., Program]
RIGHT = (
    "F0.0 S0>1.0 F0.1 S0>1.1 V0<1.0 B0.0 V0<1.1 B0.1 R0",
    "V1<0.0 F1.0 I1.0 S1>0.0 W1.0 V1<0.1 F1.1 B1.1 S1>0.1 R1",
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    spec = SCHEDULES[draw(st.sampled_from(list(SCHEDULES)))]
    return spec.generate(draw(st.integers(1, 4)), spec.min_chunks, draw(st.integers(1, 10)))


def changed(program: Program, rank: int, order: list[Action]) -> Program:
    return dataclasses.replace(program, actions=(*program.actions[:rank], tuple(order), *program.actions[rank + 1 :]))


@settings(deadline=None, max_examples=150)
@given(programs(), st.data())
def test_a_dropped_action_is_refused(program: Program, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(program.actions) - 1))
    order = list(program.actions[rank])
    del order[data.draw(st.integers(0, len(order) - 1))]
    assert problems_of(changed(program, rank, order))


@settings(deadline=None, max_examples=150)
@given(programs(), st.data())
def test_a_doubled_action_is_refused(program: Program, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(program.actions) - 1))
    order = list(program.actions[rank])
    again = data.draw(st.sampled_from(order))
    order.insert(data.draw(st.integers(0, len(order))), again)
    assert problems_of(changed(program, rank, order))


@settings(deadline=None, max_examples=200)
@given(programs(), st.data())
def test_swapped_actions_of_which_one_needs_the_other_are_refused(program: Program, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(program.actions) - 1))
    order = list(program.actions[rank])
    one = data.draw(st.sampled_from([action for action in order if action.kind != "reduce"]))
    related = [
        action
        for action in order
        if action.stage == one.stage and action.microbatch == one.microbatch and action != one
    ]
    other = data.draw(st.sampled_from(related))
    if {one.kind, other.kind} == {"backward_weight", "send"}:
        return  # the weight part needs no message, and none needs it
    here, there = order.index(one), order.index(other)
    order[here], order[there] = order[there], order[here]
    assert problems_of(changed(program, rank, order))


@settings(deadline=None, max_examples=100)
@given(programs(), st.data())
def test_swapped_messages_of_one_link_are_refused(program: Program, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(program.actions) - 1))
    order = list(program.actions[rank])
    pairs = [
        (one, other)
        for one, other in itertools.combinations([action for action in order if action.kind in ("send", "receive")], 2)
        if one.kind == other.kind
        and one.carries == other.carries
        and program.stage_ranks[one.peer_stage] == program.stage_ranks[other.peer_stage]
    ]
    if not pairs:
        return
    one, other = data.draw(st.sampled_from(pairs))
    here, there = order.index(one), order.index(other)
    order[here], order[there] = order[there], order[here]
    assert problems_of(changed(program, rank, order))


@settings(deadline=None, max_examples=60)
@given(programs(), st.data())
def test_an_early_reduction_is_refused(program: Program, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(program.actions) - 1))
    order = list(program.actions[rank])
    reduce = data.draw(st.sampled_from([action for action in order if action.kind == "reduce"]))
    last = max(
        place
        for place, action in enumerate(order)
        if action.stage == reduce.stage and action.kind in ("backward", "backward_weight")
    )
    order.remove(reduce)
    order.insert(data.draw(st.integers(0, last)), reduce)
    assert problems_of(changed(program, rank, order))


@settings(deadline=None, max_examples=60)
@given(programs(), st.data())
def test_an_action_on_another_rank_is_refused(program: Program, data: st.DataObject) -> None:
    if len(program.actions) == 1:
        return
    rank = data.draw(st.integers(0, len(program.actions) - 1))
    order = list(program.actions[rank])
    moved = order.pop(data.draw(st.integers(0, len(order) - 1)))
    program = changed(program, rank, order)
    other = (rank + 1) % len(program.actions)
    assert problems_of(changed(program, other, [*program.actions[other], moved]))


def test_the_right_program_has_no_problem(program_from: ProgramFrom) -> None:
    assert problems_of(program_from(2, (0, 1), *RIGHT)) == []


WRONG = {
    "doubled": (
        ("B0.1 R0", "B0.1 B0.0 R0"),
        ["schedule.actions[0]='B0.0': it is done 2 times: do it once"],
    ),
    "no forward": (
        ("F0.1 S0>1.1 ", "S0>1.1 "),
        ["schedule.actions[0]='F0.1': every stage runs every microbatch: add it"],
    ),
    "no backward": (
        ("V0<1.1 B0.1 ", ""),
        [
            "schedule.actions[0]='B0.1': every stage runs every microbatch backward: add it, or both I0.1 and W0.1",
            "schedule.actions[1]='S1>0.1': no action needs what it moves: leave it out",
        ],
    ),
    "no weight part": (
        ("W1.0 ", ""),
        ["schedule.actions[1]='W1.0': I1.0 is only one part of a backward pass: add it"],
    ),
    "whole and in parts": (
        ("B1.1 S1>0.1", "B1.1 S1>0.1 W1.1"),
        [
            "schedule.actions[1]='B1.1': the backward pass is done whole and in parts (W1.1): "
            "keep either it or both I1.1 and W1.1"
        ],
    ),
    "backward first": (
        ("F1.1 B1.1 S1>0.1", "B1.1 S1>0.1 F1.1"),
        ["schedule.actions[1]='B1.1': it needs F1.1, which comes after it: put it after F1.1"],
    ),
    "weights first": (
        ("I1.0 S1>0.0 W1.0", "W1.0 I1.0 S1>0.0"),
        ["schedule.actions[1]='W1.0': it needs I1.0, which comes after it: put it after I1.0"],
    ),
    "sent too early": (
        ("F0.1 S0>1.1", "S0>1.1 F0.1"),
        ["schedule.actions[0]='S0>1.1': it needs F0.1, which comes after it: put it after F0.1"],
    ),
    "received too late": (
        ("V1<0.1 F1.1", "F1.1 V1<0.1"),
        ["schedule.actions[1]='F1.1': it needs V1<0.1, which comes after it: put it after V1<0.1"],
    ),
    "not sent": (
        ("S0>1.1 ", ""),
        ["schedule.actions[0]='S0>1.1': stage 1 on rank 1 needs it: add it"],
    ),
    "not received": (
        ("V0<1.1 ", ""),
        ["schedule.actions[0]='V0<1.1': stage 0 needs what stage 1 sends: add it"],
    ),
    "received twice": (
        ("B1.1 S1>0.1", "B1.1 S1>0.1 V1<0.1"),
        ["schedule.actions[1]='V1<0.1': it is done 2 times: do it once"],
    ),
    "not reduced": (
        (" R1", ""),
        ["schedule.actions[1]='R1': the gradients of every stage are reduced once a step: add it"],
    ),
    "reduced too early": (
        ("V0<1.1 B0.1 R0", "R0 V0<1.1 B0.1"),
        ["schedule.actions[0]='R0': it needs B0.1, which comes after it: put it after B0.1"],
    ),
    "no such microbatch": (
        ("F0.1 ", "F0.2 "),
        ["schedule.actions[0]='F0.2': microbatches are 0 to 1: correct the microbatch, or the number of microbatches"],
    ),
    "no such stage": (
        ("F0.1 ", "F2.1 "),
        ["schedule.actions[0]='F2.1': stages are 0 to 1: correct the stage, or stage_ranks"],
    ),
    "wrong rank": (
        ("F0.1 ", "F0.1 F1.1 "),
        ["schedule.actions[0]='F1.1': stage 1 is on rank 1: move it to the list of rank 1"],
    ),
    "a stage skipped": (
        ("S0>1.1 ", "S0>2.1 "),
        [
            "schedule.actions[0]='S0>2.1': tensors go between a stage and the next one or the one before: "
            "name such a stage"
        ],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong(case: str, program_from: ProgramFrom) -> None:
    (old, new), problems = WRONG[case]
    texts = [text.replace(old, new) for text in RIGHT]
    assert sum(text != right for text, right in zip(texts, RIGHT, strict=True)) == 1
    assert [str(problem) for problem in problems_of(program_from(2, (0, 1), *texts))] == problems


def test_order_of_messages(program_from: ProgramFrom) -> None:
    texts = RIGHT[0], RIGHT[1].replace("V1<0.0 ", "V1<0.1 V1<0.0 ").replace("W1.0 V1<0.1", "W1.0")
    assert [str(problem) for problem in problems_of(program_from(2, (0, 1), *texts))] == [
        "schedule.actions[1]='V1<0.1': rank 0 sends S0>1.0 first, and activations from it to rank 1 arrive in the order of "
        "sending: put it after V1<0.0, or send S0>1.1 first"
    ]


def test_deadlock(program_from: ProgramFrom) -> None:
    program = program_from(
        2,
        (0, 1),
        "F0.0 S0>1.0 V0<1.0 B0.0 F0.1 S0>1.1 V0<1.1 B0.1 R0",
        "V1<0.0 F1.0 V1<0.1 F1.1 B1.0 S1>0.0 B1.1 S1>0.1 R1",
    )
    assert [str(problem) for problem in problems_of(program)] == [
        "schedule.actions[0]='V0<1.0': rank 0 waits here for S1>0.0 of rank 1, which waits at V1<0.1, for ever: "
        "put S1>0.0 before V1<0.1, or V0<1.0 later",
        "schedule.actions[1]='V1<0.1': rank 1 waits here for S0>1.1 of rank 0, which waits at V0<1.0, for ever: "
        "put S0>1.1 before V0<1.0, or V1<0.1 later",
    ]


def test_stages_of_one_rank_hand_over(program_from: ProgramFrom) -> None:
    program = program_from(1, (0, 0), "F1.0 F0.0 B0.0 B1.0 R0 R1")
    assert [str(problem) for problem in problems_of(program)] == [
        "schedule.actions[0]='F1.0': it needs F0.0, which comes after it: put it after F0.0",
        "schedule.actions[0]='B0.0': it needs B1.0, which comes after it: put it after B1.0",
    ]
    program = program_from(1, (0, 0), "F0.0 S0>1.0 F1.0 B1.0 B0.0 R0 R1")
    assert [str(problem) for problem in problems_of(program)] == [
        "schedule.actions[0]='S0>1.0': stages 0 and 1 are on one rank, where tensors are handed over: leave it out"
    ]


def test_actions_that_are_no_part_of_a_pipeline() -> None:
    gather = Action("gather", 0, -1, "model.layers.0")
    program = Program(1, ((gather, Action("forward", 0, 0), Action("backward", 0, 0), Action("reduce", 0, 0)),))
    assert [str(problem) for problem in problems_of(program)] == [
        "schedule.actions[0]='G0/model.layers.0': a pipeline's program has the actions F, B, I, W, S, V and R of whole "
        "stages: leave it out: parameters are gathered when they are first used, and released when the step ends",
        "schedule.actions[0]='R0.0': a stage is reduced once a step: write it without a microbatch",
    ]


def test_placement() -> None:
    assert [str(problem) for problem in problems_of(Program(0, ((), ()), (0, 2)))] == [
        "schedule.num_microbatches=0: a step has at least one microbatch: give 1 or more",
        "schedule.stage_ranks=[0, 2]: every stage is on one of the ranks that have a list of actions, 0 to 1: name these "
        "ranks, or give a list of actions for each rank",
    ]
    assert [str(problem) for problem in problems_of(Program(1, ((), ()), (0, 0)))] == [
        "schedule.stage_ranks=[0, 0]: every rank holds a stage, and rank 1 holds none: give it one, or use fewer ranks"
    ]


def test_without_messages(program_from: ProgramFrom) -> None:
    program = program_from(1, (0, 1), "F0.0 B0.0", "F1.0 B1.0")
    assert compute_problems_of(program) == []
    assert len(problems_of(program)) == 6


def test_activations_live_until_the_weight_part(program_from: ProgramFrom) -> None:
    assert peak_activations(program_from(2, (0,), "F0.0 I0.0 F0.1 W0.0 B0.1 R0")) == (2,)
    assert peak_activations(program_from(2, (0,), "F0.0 I0.0 W0.0 F0.1 B0.1 R0")) == (1,)
    assert peak_activations(program_from(2, (0, 1), *RIGHT)) == (2, 1)
