"""A strategy's estimate for one plan, to be laid beside what the run really keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from colossal_core.estimate import EstimateTable
from colossal_core.peak_estimate import inputs_of, profile_of, state_table
from colossal_core.plan_size import model_size

if TYPE_CHECKING:
    from colossal_core.plan import Plan
    from colossal_core.strategy import Strategy

STATE_COLUMNS = ("parameter_bytes", "master_bytes", "optimizer_bytes")


def estimated_bytes(strategy: Strategy, plan: Plan) -> Mapping[str, float]:
    """The state bytes that a strategy adds to an empty table whose one row is `plan`, under AdamW."""
    return _state_bytes(
        strategy.estimate(EstimateTable(model_size(plan, None), inputs_of(plan), plan=plan), profile_of(plan))
    )


def estimated_bytes_of_all(strategies: Sequence[Strategy], plan: Plan) -> Mapping[str, float]:
    """The state bytes of `plan`, under AdamW: where one strategy cuts what another one keeps, neither says them alone."""
    of_adamw = 2.0 * profile_of(plan).master_element_bytes
    return _state_bytes(state_table(plan, strategies, of_adamw))


def _state_bytes(table: EstimateTable) -> dict[str, float]:
    return {column: float(table.column(column)[0]) for column in STATE_COLUMNS}
