"""What a pipeline's ranks idle in a step: as it was recorded, and as it was foreseen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.plan import Plan
    from colossal_pipeline import Trace

COLUMNS = (
    "contestant", "mb", "recorded ms", "idle", "bubble", "messages", "other", "idle, its own actions simulated", "idle by estimate",
    "idle by textbook", "idle of each rank",
)  # fmt: skip
KEYS = ("idle", "idle_bubble", "idle_messages", "idle_other", "idle_simulated", "idle_estimated", "idle_textbook")


def idle_of(trace: Trace) -> dict[str, Any]:
    """Parts of all ranks' time between the first action of the step and its last. Of torch's pipelines no messages are recorded: it is not
    known what their idle time is made of.

    idle_simulated: did every action take the median of its stage, in the library's order of this schedule, and messages no time.
    idle_textbook: the same where all stages cost alike, and F, I and W take as long as one another.
    """
    from colossal_pipeline import SCHEDULES, Costs, simulate

    line, num_ranks = trace.time_line, len(trace.time_line.ranks)
    program = SCHEDULES[trace.schedule].generate(num_ranks, len(trace.stage_ranks) // num_ranks, trace.num_microbatches)
    total = line.makespan * num_ranks
    split: dict[str, float] = {}
    if any(span.action.kind == "receive" for spans in line.ranks for span in spans):
        split = {
            "idle_bubble": sum(one.bubble for one in line.idle) / total,
            "idle_messages": sum(one.messages for one in line.idle) / total,
            "idle_other": sum(one.other for one in line.idle) / total,
        }
    return {
        "recorded_seconds": line.makespan,
        "idle": line.bubble_fraction,
        **split,
        "idle_simulated": simulate(program, trace.costs()).bubble_fraction,
        "idle_textbook": simulate(program, Costs.alike(program.num_stages)).bubble_fraction,
        "idle_by_rank": [one / line.makespan for one in line.idle_seconds],
        "clock_error_seconds": trace.clock_error_seconds,
        "time_line": [[json.dumps(span)[1:-1].replace('"', "") for span in one] for one in line.written()],
    }


def estimated_idle(plan: Plan, anatomy: ModelAnatomy) -> dict[str, float]:
    """What `colossal plan --show-schedule` prints of a plan with a pipeline."""
    if plan.program.num_stages == 1:
        return {}
    from colossal_pipeline.planned import planned_time_line

    return {"idle_estimated": planned_time_line(plan, anatomy).bubble_fraction}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """rows: of a report. Nothing where none is a pipeline."""
    lines = [
        f"| {' | '.join([row['title'], str(row['micro_batch']), *_cells(row)])} |" for row in rows if "time_line" in row
    ]
    head = [f"| {' | '.join(COLUMNS)} |", f"|{'|'.join(['---', *['---:'] * (len(COLUMNS) - 1)])}|"]
    return ["", *head, *lines] if lines else []


def _cells(row: Mapping[str, Any]) -> list[str]:
    shares = [f"{row[key]:.1%}" if row.get(key) is not None else "-" for key in KEYS]
    return [f"{1e3 * row['recorded_seconds']:.1f}", *shares, " ".join(f"{one:.1%}" for one in row["idle_by_rank"])]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """The recorded steps of a report below one another, on one scale of time. Nothing where none is a pipeline."""
    rows = [row for row in report["rows"] if "time_line" in row]
    if not rows:
        return
    from colossal_pipeline import TimeLine, draw_png

    lines = {f"{row['title']}, mb {row['micro_batch']}": TimeLine.in_order(_read(row["time_line"])) for row in rows}
    draw_png(lines, path)


def _read(written: Sequence[Sequence[str]]) -> list[list[tuple[str, float, float]]]:
    spans = [[text.split(", ") for text in line] for line in written]
    return [[(action, float(start), float(end)) for action, start, end in line] for line in spans]
