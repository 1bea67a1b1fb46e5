"""Draws a time line, simulated or measured: as PNG, and as text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_core.errors import ConfigError, Problem
from colossal_core.program import LETTERS, Action, ActionKind
from colossal_pipeline.checker import COMPUTED
from colossal_pipeline.time_line import Span, TimeLine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS: dict[ActionKind, tuple[str, str]] = {
    "forward": ("#5b8ff9", "#2f5fc4"),
    "backward": ("#f6a04d", "#c9711a"),
    "backward_input": ("#f7d154", "#cfa31a"),
    "backward_weight": ("#61b77f", "#33834f"),
}
"""For each kind the colour of a rank's even chunks, and of its odd ones."""
_WAITING = "#d64550"
"""What waits for a message that was sent already."""
_NAMES: dict[ActionKind, str] = {
    "forward": "forward",
    "backward": "backward",
    "backward_input": "backward, input",
    "backward_weight": "backward, weights",
}
_MOST_NUMBERS = 600
"""Microbatches are written into the bars of a picture with no more bars than that; more would not be legible."""


def draw_text(time_line: TimeLine, width: int = 120) -> str:
    """One row a rank and a legend, no line longer than `width` characters (60 at least).

    Every action begins with its letter: `F`, `B`, `I`, `W`, small in a rank's chunks 1, 3, ... The microbatch follows where it has room in
    all of them, with stage where that has, too. A point is idle.
    """
    names = [f"rank {rank} " for rank in range(len(time_line.ranks))]
    indent = max(map(len, names), default=0)
    num_columns = max(width, 60) - indent
    scale = _column_seconds(time_line, num_columns)
    cells = [
        [(span.action, round(span.start / scale), round(span.end / scale)) for span in line if _works(span)]
        for line in time_line.ranks
    ]
    chunks = _chunks(time_line)
    room = min((end - begin for row in cells for _, begin, end in row), default=0)
    style = _style(chunks, room)
    lines = []
    for name, row in zip(names, cells, strict=True):
        columns = ["."] * max(round(time_line.makespan / scale), 0)
        for action, begin, end in row:
            columns[begin:end] = _label(action, chunks, style).ljust(end - begin, "-")[: end - begin]
        lines.append(f"{name:>{indent}}{''.join(columns)}")
    legend = [part for line in _legend(time_line, style, scale) for part in textwrap.wrap(line, max(width, 60))]
    return "\n".join([*lines, *legend])


def _column_seconds(time_line: TimeLine, num_columns: int) -> float:
    """Seconds that a column stands for: where the shortest action has two columns or more, it has a whole number of them, so that equal
    actions look equal.
    """
    scale = time_line.makespan / num_columns or 1.0
    shortest = min((span.end - span.start for line in time_line.ranks for span in line if _works(span)), default=0.0)
    whole = int(shortest / scale + 1e-9)
    return shortest / whole if whole >= 2 else scale


def draw_png(time_lines: Mapping[str, TimeLine], path: str | Path) -> None:
    """Draws one panel for each title and time line, all on one scale of time, into the file `path`.

    Raises ConfigError where the package matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        reason = "a picture needs the package matplotlib, which is not installed"
        raise ConfigError([Problem("picture", reason, "pip install 'colossal-pipeline[picture]'")]) from None
    heights = [max(1, len(line.ranks)) for line in time_lines.values()]
    figure = Figure(figsize=(14, 1.2 + sum(0.9 + 0.42 * height for height in heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (title, time_line) in zip(panels[:, 0], time_lines.items(), strict=True):
        _draw_panel(axes, title, time_line)
    panels[-1, 0].set_xlabel("seconds")
    kinds = [kind for kind in _COLORS if any(_has(line, kind) for line in time_lines.values())]
    patches = [Patch(color=_COLORS[kind][0], label=_NAMES[kind]) for kind in kinds]
    if any(any(line.messages) for line in time_lines.values()):
        patches.append(Patch(color=_WAITING, label="message under way"))
    several = any(chunk for line in time_lines.values() for chunk in _chunks(line).values())
    note = "dark: a rank's second stage" if several else None
    figure.legend(handles=patches, title=note, loc="outside upper right", ncols=max(1, len(patches)))
    figure.savefig(str(path), format="png")


def _draw_panel(axes: Axes, title: str, time_line: TimeLine) -> None:
    chunks = _chunks(time_line)
    work = [(rank, span) for rank, line in enumerate(time_line.ranks) for span in line if _works(span)]
    for rank, span in work:
        odd = chunks[span.action.stage] % 2
        color = _COLORS[span.action.kind][odd]
        seconds = span.end - span.start
        axes.broken_barh([(span.start, seconds)], (rank - 0.42, 0.84), color=color, edgecolor="white", linewidth=0.5)
        if len(work) <= _MOST_NUMBERS:
            middle = span.start + seconds / 2
            number, ink = str(span.action.microbatch), "white" if odd else "black"
            axes.text(middle, rank, number, color=ink, ha="center", va="center", fontsize=6, clip_on=True)
    for rank, waits in enumerate(time_line.messages):
        axes.broken_barh([(start, end - start) for start, end in waits], (rank - 0.21, 0.42), color=_WAITING)
    axes.set_title(f"{title}: {time_line.makespan:.4g} s, idle {time_line.bubble_fraction:.1%}", loc="left")
    axes.set_yticks(range(len(time_line.ranks)), [f"rank {rank}" for rank in range(len(time_line.ranks))])
    axes.set_ylim(len(time_line.ranks) - 0.5, -0.5)
    axes.set_xlim(0, None)


def _chunks(time_line: TimeLine) -> dict[int, int]:
    """For each stage, which of its rank's it is, in the order of the model."""
    held = [sorted({span.action.stage for span in line}) for line in time_line.ranks]
    return {stage: chunk for stages in held for chunk, stage in enumerate(stages)}


def _style(chunks: dict[int, int], room: int) -> str:
    """How much is written into each action; room: columns of the shortest one."""
    longest = max(map(len, map(str, chunks)), default=1)
    if max(chunks.values(), default=0) > 0 and room > longest + 4:
        return "stage"
    return "microbatch" if room > 2 else "letter"


def _label(action: Action, chunks: dict[int, int], style: str) -> str:
    if style == "stage":
        return str(action)
    letter = LETTERS[action.kind]
    letter = letter.lower() if chunks[action.stage] % 2 else letter
    return f"{letter}{action.microbatch}" if style == "microbatch" else letter


def _legend(time_line: TimeLine, style: str, scale: float) -> list[str]:
    names = [f"{LETTERS[kind]} {_NAMES[kind]}" for kind in _COLORS if _has(time_line, kind)]
    number = {"stage": "then stage.microbatch", "microbatch": "then microbatch", "letter": ""}[style]
    several = style != "stage" and any(chunk for chunk in _chunks(time_line).values())
    parts = [*names, number, "small: second stage of a rank" if several else ""]
    summary = f"{time_line.makespan:.4g} s, idle {time_line.bubble_fraction:.1%}, one column is {scale:.3g} s"
    return ["; ".join(part for part in parts if part), summary]


def _works(span: Span) -> bool:
    return span.action.kind in COMPUTED


def _has(time_line: TimeLine, kind: ActionKind) -> bool:
    return any(span.action.kind == kind for line in time_line.ranks for span in line)
