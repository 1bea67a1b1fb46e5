"""What a pipeline sends and holds, in closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colossal_pipeline.choice import make_program
from colossal_pipeline.cutting import NAME, read
from colossal_pipeline.layouts import AXIS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from colossal_core.estimate import EstimateTable, HardwareProfile
    from colossal_core.plan import Plan
    from colossal_core.program import Program
    from colossal_pipeline.config import PipelineConfig


def estimate_pipeline(table: EstimateTable, profile: HardwareProfile, config: PipelineConfig) -> EstimateTable:
    """Adds `bytes_pp`, and sets `num_microbatches_in_flight`: how much of a whole model's activations of one microbatch the fullest rank
    holds at once. A stage counts by its share of the blocks.

    Every tensor that crosses is taken to be the stream between blocks, [sequences, positions, features], whole on every rank of tp, and
    to get a gradient. It is that in a model of one chain. Whatever else crosses has other sizes (T5 hands on a bias for each pair of
    positions), and no gradient goes back to what nothing trained has made.
    """
    import numpy as np

    if table.plan is not None and NAME in table.plan.data:
        plan, cutting = table.plan, read(table.plan)
        messages = [max(sent_tensors(plan))]
        in_flight = [max(alive(plan.program, stage_shares(plan)))]
        width = cutting.width
    else:
        rows = list(zip(table.inputs[AXIS], table.inputs["num_microbatches"], strict=True))
        programs = {row: _candidate(config, int(row[0]), int(row[1])) for row in dict.fromkeys(rows)}
        messages = [max(_sends(programs[row], [1] * programs[row].num_stages)) for row in rows]
        in_flight = [max(alive(programs[row], _even(programs[row]))) for row in rows]
        width = table.model.hidden_size
    size = table.model.sequence_length * width * profile.compute_element_bytes
    table = table.setting("num_microbatches_in_flight", np.array(in_flight, dtype=float))
    return table.adding("bytes_pp", table.inputs["micro_size"] * size * np.array(messages, dtype=float))


def stage_shares(plan: Plan) -> list[float]:
    """Of each stage, its part of the model's blocks."""
    cutting = read(plan)
    ends = (*cutting.starts[1:], cutting.num_blocks)
    return [(end - start) / cutting.num_blocks for start, end in zip(cutting.starts, ends, strict=True)]


def alive(program: Program, shares: Sequence[float]) -> list[float]:
    """For each rank, the largest share of a whole model's activations that it holds at once: each from its `F` until its `B` or `W`, as in
    `checker.peak_activations`.
    """
    peaks = []
    for actions in program.actions:
        held = largest = 0.0
        for action in actions:
            if action.kind == "forward":
                held += shares[action.stage]
                largest = max(largest, held)
            elif action.kind in ("backward", "backward_weight"):
                held -= shares[action.stage]
        peaks.append(largest)
    return peaks


def sent_tensors(plan: Plan) -> list[int]:
    """For each pipeline rank, how many tensors it sends in a step: activations, and gradients that come back for them."""
    return _sends(plan.program, [len(found) for found in read(plan).crossing])


def _sends(program: Program, crossing: Sequence[int]) -> list[int]:
    """crossing: how many tensors cross into each stage."""
    return [
        sum(crossing[max(action.stage, action.peer_stage)] for action in actions if action.kind == "send")
        for actions in program.actions
    ]


def _candidate(config: PipelineConfig, size: int, num_microbatches: int) -> Program:
    """The program that a config asks for on another number of ranks. A file is for the ranks that it names."""
    if size == 1:
        from colossal_core.program import plain_program

        return plain_program(num_microbatches)
    return make_program(config.model_copy(update={"size": size}), num_microbatches)


def _even(program: Program) -> list[float]:
    return [1 / program.num_stages] * program.num_stages
