"""Where the numbers of a run go: lines of JSON, TensorBoard events, a picture of the loss, and whatever else keeps to `Tracker`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colossal_launch.trackers.json_lines import JsonLinesTracker, read_metrics
    from colossal_launch.trackers.loss_curve import LossCurveTracker
    from colossal_launch.trackers.tensorboard import TensorBoardTracker
    from colossal_launch.trackers.tracker import Tracker, open_trackers

__all__ = ["JsonLinesTracker", "LossCurveTracker", "TensorBoardTracker", "Tracker", "open_trackers", "read_metrics"]

_HOMES = {
    "JsonLinesTracker": "json_lines",
    "read_metrics": "json_lines",
    "LossCurveTracker": "loss_curve",
    "TensorBoardTracker": "tensorboard",
    "Tracker": "tracker",
    "open_trackers": "tracker",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
