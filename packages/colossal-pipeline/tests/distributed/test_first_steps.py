"""What GPUs do in the first steps of a batch's shapes: messages go on communicators of their own, through host memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from colossal_core.testing import RunSpec, WorkerPool, compare, table
from colossal_core.testing.probes import record, record_with_first_steps


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_messages_of_the_first_step_go_another_way(
    run_of: Callable[..., RunSpec], pool: WorkerPool, schedule: str
) -> None:
    """One step of two does: every bit is the same, and each link has as many messages either way, and a header more in the first step."""
    spec = run_of("llama", {"parallel.pipeline": {"size": 2, "schedule": schedule}})
    expected = pool.run(2, record, spec)
    for rank, (found, uses) in enumerate(pool.run(2, record_with_first_steps, spec, 1)):
        rows = compare([found], expected[rank], limit=0.0)
        assert all(row.passed for row in rows), f"\n{table(rows)}"
        earlier = [use.removesuffix(" first") for use in uses if use.endswith(" first")]
        later = uses[len(earlier) :]
        assert not any(use.endswith(" first") for use in later)
        for link in set(later):
            assert earlier.count(link) == later.count(link) + link.startswith("activations")
