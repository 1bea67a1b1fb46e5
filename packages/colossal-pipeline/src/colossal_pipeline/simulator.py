"""Turns costs into a time line: what each rank does when, how long it idles, and the bytes of its activations."""

from __future__ import annotations

from collections import deque

from colossal_core.program import Program
from colossal_pipeline.stage_costs import Costs
from colossal_pipeline.time_line import Span, TimeLine


def simulate(program: Program, costs: Costs) -> TimeLine:
    """When every action of a checked program begins and ends, in seconds from the begin of the step.

    A rank does its actions one after another. A send takes no time of its rank; its tensors arrive `link_seconds` later, whatever else is
    on the way. A receive lasts until they are there. Reductions are outside: they take no time.
    """
    assert len(costs.stages) == program.num_stages, f"{len(costs.stages)} costs for {program.num_stages} stages"
    waiting = [deque(order) for order in program.actions]
    lines: list[list[Span]] = [[] for _ in waiting]
    clocks = [0.0] * len(waiting)
    arrival: dict[tuple[int, int, int], float] = {}
    while any(waiting):
        before = sum(map(len, waiting))
        for rank, order in enumerate(waiting):
            while order:
                action = order[0]
                start = end = clocks[rank]
                if action.kind == "receive":
                    there = arrival.get((action.peer_stage, action.stage, action.microbatch))
                    if there is None:
                        break
                    end = max(start, there)
                elif action.kind == "send":
                    arrival[action.stage, action.peer_stage, action.microbatch] = start + costs.link_seconds
                else:
                    end = start + costs.stages[action.stage].seconds(action)
                lines[rank].append(Span(action, start, end))
                clocks[rank] = end
                order.popleft()
        assert sum(map(len, waiting)) < before, "a program is checked before it is simulated, and this one never ends"
    return TimeLine(tuple(map(tuple, lines)))


def peak_bytes(program: Program, costs: Costs) -> tuple[int, ...]:
    """For each rank, the largest sum of the bytes that `StageCosts` says are kept at one time."""
    peaks = []
    for order in program.actions:
        kept = peak = 0
        for action in order:
            stage = costs.stages[action.stage]
            part = stage.activation_bytes if stage.weight_part_bytes is None else stage.weight_part_bytes
            if action.kind == "forward":
                kept += stage.activation_bytes
            elif action.kind == "backward":
                kept -= stage.activation_bytes
            elif action.kind == "backward_input":
                kept -= stage.activation_bytes - part
            elif action.kind == "backward_weight":
                kept -= part
            peak = max(peak, kept)
        peaks.append(peak)
    return tuple(peaks)
