"""Programs from texts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from colossal_core.program import Program
from colossal_pipeline.schedule_files import parse_action

ProgramFrom = Callable[..., Program]


@pytest.fixture
def program_from() -> ProgramFrom:
    """`program_from(num_microbatches, stage_ranks, "F0.0 ...", "F1.0 ...")`: one text for each rank."""

    def build(num_microbatches: int, stage_ranks: tuple[int, ...], *texts: str) -> Program:
        actions = tuple(tuple(map(parse_action, text.split())) for text in texts)
        return Program(num_microbatches, actions, stage_ranks)

    return build
