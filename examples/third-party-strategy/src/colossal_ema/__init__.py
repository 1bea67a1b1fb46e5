"""An exponential moving average of the weights for Colossal."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_core.trained import Trained

__all__ = ["averaged"]


def averaged(trained: Trained) -> AbstractContextManager[None]:
    """A context in which a trained model has the averaged weights: for evaluation and export. Every rank enters it."""
    from colossal_ema.strategy import EmaStrategy

    strategy = trained.strategy("ema")
    assert isinstance(strategy, EmaStrategy), "another plugin calls its strategy ema"
    return strategy.swapped()
