"""The trackers of a run: what is always kept, and what is kept where its package is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from colossal_core.errors import ConfigError
from colossal_launch.trackers.json_lines import JsonLinesTracker
from colossal_launch.trackers.loss_curve import LossCurveTracker
from colossal_launch.trackers.protocol import Metrics, Tracker
from colossal_launch.trackers.tensorboard import TensorBoardTracker

__all__ = ["Metrics", "Tracker", "open_trackers"]


def open_trackers(folder: Path, resumed_step: int = 0) -> tuple[list[Tracker], list[str]]:
    """The trackers of a run in its folder, and one note for each that is left out because its package is not installed.

    Files: `metrics.jsonl`, `tensorboard/`, `loss.png`. resumed_step: finished steps that the run starts from.
    """
    lines = folder / "metrics.jsonl"
    trackers: list[Tracker] = [JsonLinesTracker(lines, resumed_step)]
    notes = []
    optional: tuple[tuple[str, Callable[[], Tracker]], ...] = (
        ("TensorBoard events", lambda: TensorBoardTracker(folder / "tensorboard", resumed_step)),
        ("the loss curve", lambda: LossCurveTracker(folder / "loss.png", lines)),
    )
    for what, make in optional:
        try:
            trackers.append(make())
        except ConfigError as error:
            problem = error.problems[0]
            notes.append(f"{what} left out: {problem.reason}: {problem.remedy}")
    return trackers, notes
