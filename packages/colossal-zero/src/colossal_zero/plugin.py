"""What colossal-zero contributes, found through the entry point `zero` of the group `colossal.plugins`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from colossal_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from colossal_core.optimizers import OptimizerSpec
    from colossal_core.strategy import StrategySpec

COLOSSAL_PLUGIN_API = (0, 1)


@hookimpl
def colossal_strategies() -> Sequence[StrategySpec]:
    from colossal_zero.strategy import zero_spec

    return [zero_spec()]


@hookimpl
def colossal_optimizers() -> Sequence[OptimizerSpec]:
    from colossal_zero.optimizers.adafactor import ADAFACTOR
    from colossal_zero.optimizers.lamb import LAMB
    from colossal_zero.optimizers.lars import LARS
    from colossal_zero.optimizers.lion import LION
    from colossal_zero.optimizers.muon import MUON

    return [ADAFACTOR, LAMB, LARS, LION, MUON]
