"""The schedules by the names that a config gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from colossal_core.errors import Problem
from colossal_core.program import Program
from colossal_pipeline.schedules import dualpipev, gpipe, interleaved, looped_bfs, one_f_one_b, zb_h1, zb_h2, zbv
from colossal_pipeline.schedules.closed_form import ClosedForm
from colossal_pipeline.schedules.orders import loop_ranks, v_ranks
from colossal_pipeline.stage_costs import StageCosts


@dataclass(frozen=True)
class ScheduleSpec:
    """What is known of a schedule before it is generated.

    name: in the config. placement: `loop`, stage s on rank s mod p; `V`, chunk 0 from the first rank to the last and chunk 1 back.
    min_chunks, max_chunks: stages that a rank may hold; None: any number. splits_backward: whether it has `I` and `W` actions. paper: its
    source. generate: (ranks, chunks, microbatches) to the program. closed_form: (ranks, chunks, microbatches, costs of every stage) to what
    it idles and holds; None where its conditions, which its docstring names, do not hold.
    """

    name: str
    placement: Literal["loop", "V"]
    min_chunks: int
    max_chunks: int | None
    splits_backward: bool
    paper: str
    generate: Callable[[int, int, int], Program]
    closed_form: Callable[[int, int, int, StageCosts], ClosedForm | None]

    def stage_ranks(self, num_ranks: int, num_chunks: int) -> tuple[int, ...]:
        """For each stage the rank that holds it, as in the program."""
        return loop_ranks(num_ranks, num_chunks) if self.placement == "loop" else v_ranks(num_ranks)

    def takes(self, num_chunks: int) -> bool:
        """Whether a rank may hold that many stages."""
        return self.min_chunks <= num_chunks and (self.max_chunks is None or num_chunks <= self.max_chunks)

    def problems(self, field: str, num_chunks: int) -> list[Problem]:
        """Why a number of chunks is not allowed; `field` is the config's name of it."""
        if self.takes(num_chunks):
            return []
        allowed = f"{self.min_chunks} or more" if self.max_chunks is None else f"{self.min_chunks}"
        stages = "stage" if allowed == "1" else "stages"
        fitting = ", ".join(name for name, spec in SCHEDULES.items() if spec.takes(num_chunks))
        remedy = f"give {allowed}, or choose a schedule that takes {num_chunks} ({fitting})"
        return [Problem(field, f"schedule {self.name} has {allowed} {stages} on each rank", remedy, num_chunks)]


SCHEDULES: Mapping[str, ScheduleSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            ScheduleSpec("gpipe", "loop", 1, 1, False, "arXiv:1811.06965", gpipe.gpipe, gpipe.closed_form),
            ScheduleSpec(
                "1f1b", "loop", 1, 1, False, "arXiv:2006.09503", one_f_one_b.one_f_one_b, one_f_one_b.closed_form
            ),
            ScheduleSpec(
                "interleaved",
                "loop",
                2,
                None,
                False,
                "arXiv:2104.04473",
                interleaved.interleaved,
                interleaved.closed_form,
            ),
            ScheduleSpec(
                "looped-bfs", "loop", 2, None, False, "arXiv:2211.05953", looped_bfs.looped_bfs, looped_bfs.closed_form
            ),
            ScheduleSpec("zb-h1", "loop", 1, 1, True, "arXiv:2401.10241", zb_h1.zb_h1, zb_h1.closed_form),
            ScheduleSpec("zb-h2", "loop", 1, 1, True, "arXiv:2401.10241", zb_h2.zb_h2, zb_h2.closed_form),
            ScheduleSpec("zbv", "V", 2, 2, True, "arXiv:2401.10241", zbv.zbv, zbv.closed_form),
            ScheduleSpec("dualpipev", "V", 2, 2, True, "arXiv:2412.19437", dualpipev.dualpipev, dualpipev.closed_form),
        )
    }
)
"""Config name -> schedule."""
