"""What a tracker is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

Metrics = Mapping[str, float | int | bool]
"""Numbers of one step by name: `loss`, `grad_norm`, `learning_rate`, `num_tokens`, `tokens_per_second`, `val_bits_per_byte`, ..."""


class Tracker(Protocol):
    """Keeps the numbers of a run. One process of the run has trackers; the others have none."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Takes the numbers of a step. step: finished steps, from 1; called again for a step where an evaluation follows it."""

    def close(self) -> None:
        """Writes what is held back. Called once, at the end of the run, however it ended."""
