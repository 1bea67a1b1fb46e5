"""The program of a plan as a time line, by estimate and as it was measured: what `colossal plan --show-schedule` prints and draws."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_pipeline.checker import peak_activations
from colossal_pipeline.cutting import block_costs, read
from colossal_pipeline.picture import draw_png, draw_text
from colossal_pipeline.simulator import simulate
from colossal_pipeline.stage_costs import Costs, StageCosts
from colossal_pipeline.trace import Trace, recorded_file

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
    """The time line of a plan's program as text, with what each rank idles and keeps; below it a recorded step, where the config has one
    recorded and a run has. picture: the file that gets the same as PNG, both on one scale.

    Raises: ConfigError where the recorded step is one of another program.
    """
    program, time_line = plan.program, planned_time_line(plan, anatomy)
    columns = shutil.get_terminal_size((WIDTH, 24)).columns
    title = f"{_schedule(plan)}, {program.num_stages} stages on {len(program.actions)} ranks, {program.num_microbatches} microbatches"
    lines = [f"schedule    {title}", f"by estimate: {UNIT}; messages take no time", draw_text(time_line, columns)]
    for rank, (idle, count) in enumerate(zip(time_line.idle_seconds, peak_activations(program), strict=True)):
        part = idle / time_line.makespan if time_line.makespan else 0.0
        lines.append(
            f"rank {rank}: idle {part:.1%}, activations kept at once: {count} (each a microbatch's of a stage)"
        )
    drawn = {f"{title}, by estimate": time_line}
    path = recorded_file(plan)
    if path is not None and not path.exists():
        lines.append(f"measured    not yet: a run with this config writes {path}")
    elif path is not None:
        trace = Trace.read(path)
        trace.check(program)
        lines += ["", *measured_lines(trace, time_line, columns)]
        factor = sum(trace.time_line.busy_seconds) / (sum(time_line.busy_seconds) or 1.0)
        drawn = {f"{title}, by estimate": time_line.scaled(factor), f"measured in step {trace.step}": trace.time_line}
    if picture is not None:
        draw_png(drawn, picture)
        lines.append(f"picture     {picture}")
    return "\n".join(lines)


def measured_lines(trace: Trace, estimate: TimeLine, columns: int) -> list[str]:
    """The text of a recorded step, and how its idle time compares with what was foreseen."""
    line = trace.time_line
    apart = f"the ranks' clocks are known to {1e3 * trace.clock_error_seconds:.2g} ms"
    lines = [f"measured    step {trace.step}; {apart}", draw_text(line, columns)]
    for rank, (whole, idle) in enumerate(zip(line.idle_seconds, line.idle, strict=True)):
        seconds = (whole, idle.bubble, idle.messages, idle.other)
        shown = [f"{one / (line.makespan or 1.0):.1%}" for one in seconds]
        lines.append(
            f"rank {rank}: idle {shown[0]}: bubble {shown[1]}, waiting for messages under way {shown[2]}, other {shown[3]}"
        )
    again = simulate(trace.program, trace.costs())
    lines.append(
        f"idle        {line.bubble_fraction:.1%} measured; {estimate.bubble_fraction:.1%} by estimate; "
        f"{again.bubble_fraction:.1%} by simulation, did every action take the median of its stage and messages no time"
    )
    return lines


def _schedule(plan: Plan) -> str:
    return str(getattr(getattr(plan.config.section("parallel"), "pipeline", None), "schedule", "pipeline"))
