"""What a schedule's paper says that it idles and holds: the formula beside the algorithm, compared with the simulator by the tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClosedForm:
    """For stages that cost the same and links that take no time.

    bubble_seconds: `TimeLine.bubble_seconds`, what papers call the bubble. idle_seconds: how long every rank idles in a step that begins
    and ends at one time on all ranks; more than the bubble where a rank could begin its next step before others have ended. busy_seconds:
    how long every rank computes. peak_activations: for each rank, as `colossal_pipeline.checker.peak_activations` counts them.
    """

    bubble_seconds: float
    idle_seconds: float
    busy_seconds: float
    peak_activations: tuple[int, ...]

    @property
    def bubble_fraction(self) -> float:
        """Part of a step that a rank idles, from 0 to 1: `TimeLine.bubble_fraction`."""
        return self.idle_seconds / (self.idle_seconds + self.busy_seconds)
