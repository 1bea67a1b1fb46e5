"""The loss as a picture, drawn from `metrics.jsonl`, so that a resumed run shows all of it."""

from __future__ import annotations

from pathlib import Path

from colossal_core.errors import ConfigError, Problem
from colossal_launch.trackers.json_lines import read_metrics
from colossal_launch.trackers.protocol import Metrics

_VALIDATION = "val_bits_per_byte"


class LossCurveTracker:
    """Draws `picture` from the lines of `metrics` after each evaluation and at the end. Stands after the tracker that writes the lines.

    Raises ConfigError where the package matplotlib is not installed.
    """

    def __init__(self, picture: Path, metrics: Path) -> None:
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            reason = "needs the package matplotlib, which is not installed"
            raise ConfigError([Problem("loss_curve", reason, "pip install 'colossal-launch[plot]'")]) from None
        self._picture = picture
        self._metrics = metrics

    def log(self, step: int, metrics: Metrics) -> None:
        if _VALIDATION in metrics:
            self._draw()

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        lines = list(read_metrics(self._metrics))
        loss = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        held_out = [(line["step"], line[_VALIDATION]) for line in lines if line.get(_VALIDATION) is not None]
        if not loss:
            return
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        (training,) = axes.plot(*zip(*loss, strict=True), color="tab:blue", linewidth=1, label="training loss")
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        curves = [training]
        if held_out:
            right = axes.twinx()
            curves += right.plot(
                *zip(*held_out, strict=True), color="tab:orange", marker="o", markersize=4, label="held-out text"
            )
            right.set_ylabel("bits per byte")
            step, value = held_out[-1]
            right.annotate(f"{value:.3f}", (step, value), textcoords="offset points", xytext=(-6, 8), ha="right")
        axes.legend(handles=curves, loc="upper right")
        aside = self._picture.with_name(f"{self._picture.stem}.tmp.png")
        figure.savefig(str(aside))
        aside.replace(self._picture)
