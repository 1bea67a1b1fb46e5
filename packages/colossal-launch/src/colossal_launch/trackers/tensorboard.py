"""TensorBoard events, through torch's own writer."""

from __future__ import annotations

from pathlib import Path

from colossal_core.errors import ConfigError, Problem
from colossal_launch.trackers.protocol import Metrics


class TensorBoardTracker:
    """Writes events into `folder`. resumed_step: events after it, of a run that was stopped, are hidden.

    Raises ConfigError where the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            reason = "needs the package tensorboard, which is not installed"
            raise ConfigError([Problem("tensorboard", reason, "pip install 'colossal-launch[track]'")]) from None
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
