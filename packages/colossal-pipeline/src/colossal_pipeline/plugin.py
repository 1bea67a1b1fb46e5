"""What colossal-pipeline contributes, found through the entry point `pipeline` of the group `colossal.plugins`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from colossal_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from colossal_core.strategy import StrategySpec

COLOSSAL_PLUGIN_API = (0, 1)


@hookimpl
def colossal_strategies() -> Sequence[StrategySpec]:
    from colossal_pipeline.strategy import pipeline_spec

    return [pipeline_spec()]
