"""The section `parallel.pipeline`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from colossal_core.config import Section


def file_of_step(step: int) -> str:
    """The name of the file in which a recorded step is written."""
    return f"pipeline-step-{step}.json"


class PipelineConfig(Section):
    """Pipeline parallelism: the model's blocks are cut into stages, one behind the other on `size` ranks, and microbatches flow through."""

    size: Annotated[int, Field(ge=1)] = 1
    """Number of ranks that stand behind one another. 1: the model is not cut."""
    schedule: str = "1f1b"
    """In which order a rank works: `gpipe`, `1f1b`, `interleaved`, `looped-bfs`, `zb-h1`, `zb-h2`, `zbv`, `dualpipev`, or the path of a
    file (`.yaml`, `.json`) with a schedule of your own."""
    chunks: Annotated[int, Field(ge=1)] | None = None
    """Stages that each rank holds. null: 1, or 2 where the schedule needs several. There are `size` x `chunks` stages."""
    blocks: list[Annotated[int, Field(ge=1)]] | str | None = None
    """Number of blocks of each stage, first stage first. Or the path of a recorded step (`record_step`), of any schedule and number of
    stages: stages that take equally long by what was measured there. null: by the sizes of matrices; a head counts by its own."""
    record_step: Annotated[int, Field(ge=1)] | None = None
    """Number of a step, from 1 (on GPUs from 3: the first ones send through host memory), of which every rank records when each action
    began and ended; rank 0 writes them into `pipeline-step-N.json` in `checkpoint.directory`, from which `colossal plan --show-schedule`
    shows them. null: nothing is recorded."""
