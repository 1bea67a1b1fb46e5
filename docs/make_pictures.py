"""Draws the pictures of the documentation: `python docs/make_pictures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES = Path(__file__).parent / "images"
INK, MUTED = "#1f2a44", "#5b6785"
CORE, COMM, STRATEGY = "#dfe7fb", "#d6f0e6", "#fdeccf"
STEPS = (
    ("config", "one YAML,\nevery problem\nat once", CORE),
    ("plan", "mesh, layouts,\nprogram: data,\nno GPU", CORE),
    ("mesh", "process groups,\nNCCL or gloo", COMM),
    ("wrap", "strategies,\nphase by phase", STRATEGY),
    ("step", "microbatches,\nfinish gradients,\nclip, update", CORE),
    ("checkpoint", "sharded, loads\non any mesh", CORE),
)
STEP_ACTIONS = ("F0", "B0", "F1", "B1", "reduce", "norm", "clip", "optimizer")


def box(
    axes: Axes, corner: tuple[float, float], size: tuple[float, float], colour: str, title: str, text: str = ""
) -> None:
    """A rounded box with a title and, below it, a few lines of text. Coordinates are data coordinates of `axes`."""
    from matplotlib.patches import FancyBboxPatch

    shape = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=shape, facecolor=colour, edgecolor=INK, linewidth=1.1))
    middle = corner[0] + size[0] / 2
    top = corner[1] + size[1] - 0.32 if text else corner[1] + size[1] / 2
    axes.text(middle, top, title, ha="center", va="center", color=INK, fontsize=13 if text else 10.5, weight="bold")
    if text:
        axes.text(middle, top - 0.28, text, ha="center", va="top", color=MUTED, fontsize=9.5, linespacing=1.35)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.3})


def draw_step(axes: Axes, left: float, actions: Sequence[str]) -> None:
    """The actions of one step as a row of small boxes that starts at `left`."""
    width = 1.3
    for index, action in enumerate(actions):
        colour = STRATEGY if action == "reduce" else CORE
        box(axes, (left + index * (width + 0.12), 0.95), (width, 0.55), colour, action)
    end = left + len(actions) * (width + 0.12) - 0.12
    axes.text((left + end) / 2, 0.62, "train_step(batch): the same line under every strategy", ha="center", color=MUTED)


def architecture(path: Path) -> None:
    """One training step from left to right, coloured by the package that does it; below, the inside of `step`."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(12.6, 4.9), dpi=130)
    axes.set_xlim(0, 13.1)
    axes.set_ylim(-0.35, 4.75)
    axes.set_axis_off()
    for index, (title, text, colour) in enumerate(STEPS):
        left = 0.2 + index * 2.15
        box(axes, (left, 2.35), (1.8, 1.6), colour, title, text)
        if index:
            arrow(axes, (left - 0.35, 3.15), (left, 3.15))
    step_middle = 0.2 + 4 * 2.15 + 0.9
    arrow(axes, (step_middle, 2.35), (step_middle, 1.5))
    draw_step(axes, 0.9, STEP_ACTIONS)
    axes.text(0.2, 4.4, "One training step", color=INK, fontsize=16, weight="bold", va="center")
    owners = (("colossal-core", CORE), ("colossal-comm", COMM), ("strategies, found by entry point", STRATEGY))
    for index, (name, colour) in enumerate(owners):
        left = 0.9 + index * 2.9
        box(axes, (left, -0.2), (0.32, 0.32), colour, "")
        axes.text(left + 0.45, -0.04, name, color=INK, fontsize=10, va="center")
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    architecture(IMAGES / "architecture.png")
