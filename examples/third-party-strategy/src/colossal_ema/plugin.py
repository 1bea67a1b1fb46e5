"""What colossal-ema contributes, found through the entry point `ema` of the group `colossal.plugins`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from colossal_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from colossal_core.strategy import StrategySpec
    from colossal_ema.config import EmaConfig
    from colossal_ema.strategy import EmaStrategy

COLOSSAL_PLUGIN_API = (0, 1)


@hookimpl
def colossal_strategies() -> Sequence[StrategySpec]:
    from colossal_core.strategy import StrategySpec
    from colossal_ema.config import EmaConfig

    return [StrategySpec("ema", "ema", EmaConfig, _made)]


def _made(config: EmaConfig) -> EmaStrategy | None:
    """The strategy, or none where the config asks for no average."""
    from colossal_ema.strategy import EmaStrategy

    return None if config.decay is None else EmaStrategy(config)
