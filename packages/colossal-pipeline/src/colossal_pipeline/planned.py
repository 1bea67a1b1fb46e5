"""The program of a plan as a time line, by estimate: what `colossal plan --show-schedule` prints and draws."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_pipeline.checker import peak_activations
from colossal_pipeline.cutting import block_costs, read
from colossal_pipeline.picture import draw_png, draw_text
from colossal_pipeline.simulator import simulate
from colossal_pipeline.stage_costs import Costs, StageCosts

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.plan import Plan
    from colossal_pipeline.time_line import TimeLine

WIDTH = 120
"""Columns of the text where no terminal says how many it has."""
UNIT = "1 s stands for the forward pass of one microbatch through an average stage"


def planned_costs(plan: Plan, anatomy: ModelAnatomy) -> Costs:
    """What each stage of a plan costs, by the elements that a token is multiplied with: once in the forward pass, and once each for the two
    parts of the backward pass. One second is the forward pass of an average stage; messages take no time.
    """
    assert anatomy.flow is not None, "a plan with stages was made from the flow between blocks"
    cutting, costs = read(plan), block_costs(anatomy, anatomy.flow)
    ends = (*cutting.starts[1:], cutting.num_blocks)
    sums = [sum(costs[start:end]) for start, end in zip(cutting.starts, ends, strict=True)]
    average = sum(sums) / len(sums) or 1.0
    return Costs(tuple(StageCosts(size / average, size / average, size / average) for size in sums))


def planned_time_line(plan: Plan, anatomy: ModelAnatomy) -> TimeLine:
    """When each rank does what in a step of a plan, in the seconds of `planned_costs`."""
    return simulate(plan.program, planned_costs(plan, anatomy))


def show_schedule(plan: Plan, anatomy: ModelAnatomy, picture: Path | None) -> str:
    """The time line of a plan's program as text, with what each rank idles and keeps. picture: the file that gets the same as PNG."""
    program, time_line = plan.program, planned_time_line(plan, anatomy)
    columns = shutil.get_terminal_size((WIDTH, 24)).columns
    title = f"{_schedule(plan)}, {program.num_stages} stages on {len(program.actions)} ranks, {program.num_microbatches} microbatches"
    lines = [f"schedule    {title}", f"by estimate: {UNIT}; messages take no time", draw_text(time_line, columns)]
    for rank, (idle, count) in enumerate(zip(time_line.idle_seconds, peak_activations(program), strict=True)):
        part = idle / time_line.makespan if time_line.makespan else 0.0
        lines.append(
            f"rank {rank}: idle {part:.1%}, activations kept at once: {count} (each a microbatch's of a stage)"
        )
    if picture is not None:
        draw_png({f"{title}, by estimate": time_line}, picture)
        lines.append(f"picture     {picture}")
    return "\n".join(lines)


def _schedule(plan: Plan) -> str:
    return str(getattr(getattr(plan.config.section("parallel"), "pipeline", None), "schedule", "pipeline"))
