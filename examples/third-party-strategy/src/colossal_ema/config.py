"""The section `ema`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from colossal_core.config import Section


class EmaConfig(Section):
    """An exponential moving average of the weights (Polyak and Juditsky 1992), for evaluation and export."""

    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the old average that an update keeps. null: no average is kept."""
    every_steps: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps between updates of the average."""
