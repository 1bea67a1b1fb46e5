"""A strategy's estimate for one plan, to be laid beside what the run really keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from colossal_core.estimate import EstimateTable
from colossal_core.peak_estimate import inputs_of, model_size, profile_of

if TYPE_CHECKING:
    from colossal_core.plan import Plan
    from colossal_core.strategy import Strategy

STATE_COLUMNS = ("parameter_bytes", "master_bytes", "optimizer_bytes")


def estimated_bytes(strategy: Strategy, plan: Plan) -> Mapping[str, float]:
    """The state bytes that a strategy adds to an empty table whose one row is `plan`, under AdamW."""
    found = strategy.estimate(EstimateTable(model_size(plan, None), inputs_of(plan)), profile_of(plan))
    return {column: float(found.column(column)[0]) for column in STATE_COLUMNS}
