"""Tensor parallelism inside the stages of a pipeline, compared with one process in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from colossal_core.testing import RunSpec

pytest.importorskip("colossal_tensor")

Run = Callable[..., RunSpec]
Exact = Callable[[RunSpec, int], None]

WHOLE, SPLIT = "1f1b", "zb-h1"


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize(("kind", "schedule"), [("llama", WHOLE), ("llama", SPLIT), ("gpt2", WHOLE), ("gpt2", "zbv")])
def test_tensor_parallelism_inside_a_stage(
    run_of: Run, exact: Exact, kind: str, schedule: str, sequence_parallel: bool
) -> None:
    parallel: dict[str, Any] = {
        "parallel.pipeline": {"size": 2, "schedule": schedule},
        "parallel.tensor": {"size": 2, "sequence_parallel": sequence_parallel},
    }
    exact(run_of(kind, parallel), 4)


def test_compiled_blocks_in_two_parts(run_of: Run, exact: Exact) -> None:
    """A part that communicates does so in the same order on all ranks of a stage."""
    parallel: dict[str, Any] = {
        "parallel.pipeline": {"size": 2, "schedule": SPLIT},
        "parallel.tensor": {"size": 2},
        "compile": {"enabled": True, "backend": "aot_eager"},
    }
    exact(run_of("llama", parallel), 4)
