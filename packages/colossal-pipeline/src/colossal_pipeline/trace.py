"""A recorded step as a file: which schedule it was, and what every rank did when."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_core.errors import ConfigError, Problem
from colossal_core.program import ActionKind, Program
from colossal_pipeline.config import file_of_step
from colossal_pipeline.stage_costs import Costs, StageCosts
from colossal_pipeline.time_line import TimeLine

if TYPE_CHECKING:
    from colossal_core.plan import Plan

FORMAT = "colossal pipeline step 1"
FIELD = "parallel.pipeline.record_step"
BLOCKS_FIELD = "parallel.pipeline.blocks"


@dataclass(frozen=True)
class Trace:
    """schedule: as the config names it. step: of the run, from 1. stage_ranks: for each stage its rank. blocks: how many each stage has.
    clock_error_seconds: how wrong a rank's clock may be at most, beside the first one's. time_line: of every rank; time 0 is when the
    first one begins.
    """

    schedule: str
    step: int
    num_microbatches: int
    stage_ranks: tuple[int, ...]
    blocks: tuple[int, ...]
    clock_error_seconds: float
    time_line: TimeLine

    def write(self, path: Path) -> None:
        """Writes a JSON file, one line for each action. Makes its folder where there is none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "format": FORMAT,
            "schedule": self.schedule,
            "step": self.step,
            "num_microbatches": self.num_microbatches,
            "stage_ranks": self.stage_ranks,
            "blocks": self.blocks,
            "clock_error_seconds": self.clock_error_seconds,
        }
        lines = [",\n".join(json.dumps(span) for span in line) for line in self.time_line.written()]
        ranks = "\n],\n[\n".join(lines)
        path.write_text(f'{json.dumps(head)[:-1]}, "ranks": [[\n{ranks}\n]]}}\n', encoding="utf-8")

    @classmethod
    def read(cls, path: Path, field: str = FIELD) -> Trace:
        """Raises ConfigError, of a field of the config, where the file holds something else."""
        remedy = "record it anew, or leave it out"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r}")
            return cls(
                str(found["schedule"]),
                int(found["step"]),
                int(found["num_microbatches"]),
                tuple(map(int, found["stage_ranks"])),
                tuple(int(count) for count, _ in zip(found["blocks"], found["stage_ranks"], strict=True)),
                float(found["clock_error_seconds"]),
                TimeLine.in_order(found["ranks"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{path} holds no recorded step ({type(error).__name__}: {error})"
            raise ConfigError([Problem(field, reason, remedy)]) from None

    @property
    def program(self) -> Program:
        """What was recorded, as the ranks did it."""
        actions = tuple(tuple(span.action for span in line) for line in self.time_line.ranks)
        return Program(self.num_microbatches, actions, self.stage_ranks)

    def check(self, program: Program) -> None:
        """Raises ConfigError where another program was recorded."""
        if self.program != program:
            reason = (
                f"the recorded step is one of another program than the plan's: {self.schedule}, {len(self.stage_ranks)} stages on "
                f"{len(self.time_line.ranks)} ranks, {self.num_microbatches} microbatches"
            )
            raise ConfigError([Problem(FIELD, reason, "give the config of the run that has recorded it")])

    def costs(self) -> Costs:
        """What a microbatch took in each stage: the median of its actions of one kind. Messages take no time."""
        taken: dict[tuple[int, ActionKind], list[float]] = defaultdict(list)
        for line in self.time_line.ranks:
            for span in line:
                taken[span.action.stage, span.action.kind].append(span.end - span.start)

        def median(stage: int, kind: ActionKind) -> float:
            return statistics.median(taken.get((stage, kind), [0.0]))

        return Costs(
            tuple(
                StageCosts(
                    median(stage, "forward"),
                    median(stage, "backward_input"),
                    median(stage, "backward_weight"),
                    median(stage, "backward") if (stage, "backward") in taken else None,
                )
                for stage in range(len(self.stage_ranks))
            )
        )


def measured_costs(trace: Trace, estimated: Sequence[float]) -> list[float]:
    """Seconds of each block in a microbatch, forward and backward, whose sums over the recorded stages are what these took.

    estimated: of each block, in one unit: by it a stage's time is divided among its blocks. The time by which the first or the last stage
    is slower than those between them, for what it is estimated at, is that of what stands before the first block or behind the last.
    """
    assert sum(trace.blocks) == len(estimated), f"{trace.blocks} blocks, {len(estimated)} estimates"
    taken = [costs.forward + costs.whole_backward for costs in trace.costs().stages]
    stops = list(itertools.accumulate(trace.blocks))
    shares = [list(estimated[stop - count : stop]) for stop, count in zip(stops, trace.blocks, strict=True)]
    if min(map(sum, shares)) <= 0:  # nothing is known of some stage's blocks: all count alike
        shares = [[1.0] * len(share) for share in shares]
    rates = [seconds / sum(share) for seconds, share in zip(taken, shares, strict=True)]
    usual = statistics.median(rates[1:-1]) if len(rates) > 2 else min(rates)
    for end in (0, -1):
        rest = max(taken[end] - usual * sum(shares[end]), 0.0)
        rates[end] = min(rates[end], usual)
        shares[end][end] += rest / rates[end] if rates[end] else 0.0
    return [rate * part for rate, share in zip(rates, shares, strict=True) for part in share]


def recorded_file(plan: Plan) -> Path | None:
    """Where the step is written that the plan's config names, if it names one."""
    step = getattr(getattr(plan.config.section("parallel"), "pipeline", None), "record_step", None)
    return None if step is None else Path(plan.config.checkpoint.directory) / file_of_step(step)
