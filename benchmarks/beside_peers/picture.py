"""The picture of a report: tokens a second and GPU of every contestant by micro-batch, and the memory that it took beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED = "#1f2a44", "#5b6785"
PEER_COLOURS, OUR_COLOURS = ("#c9d0de", "#97a3bc", "#5b6785"), ("#9fd8c0", "#4fb08c", "#23795b")


def draw(report: dict[str, Any], path: Path) -> None:
    """report: as `Report.write` wrote it. Failed rows have no bar, and say why."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"]
    titles = list(dict.fromkeys(row["title"] for row in rows))
    sizes = sorted({row["micro_batch"] for row in rows})
    height = 1.4 + 0.32 * len(titles) * max(1, len(sizes))
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, height), dpi=130, sharey=True)
    _bars(speed, rows, titles, sizes, "tokens_per_second_per_gpu", "{:,.0f}")
    _bars(memory, rows, titles, sizes, "peak_allocated_gib", "{:.1f}")
    speed.set_yticks(range(len(titles)), titles, color=INK)
    speed.invert_yaxis()
    speed.set_xlabel("tokens/s per GPU", color=MUTED)
    memory.set_xlabel("peak GiB allocated, highest rank", color=MUTED)
    machine, given = report["machine"], report["given"]
    title = f"{given['model']}, {machine.get('ranks', '?')} x {machine.get('device', '?')}, micro-batch {', '.join(map(str, sizes))}"
    figure.suptitle(title, color=INK, fontsize=12, weight="bold")
    versions = (
        f"{given.get('date', '')}  torch {machine.get('torch', '?')}, transformers {machine.get('transformers', '?')}"
    )
    figure.text(0.99, 0.01, versions, ha="right", color=MUTED, fontsize=7.5)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def _bars(axes: Axes, rows: list[dict[str, Any]], titles: list[str], sizes: list[int], key: str, form: str) -> None:
    thickness = 0.8 / max(1, len(sizes))
    for row in rows:
        place = sizes.index(row["micro_batch"])
        middle = titles.index(row["title"]) + (place - (len(sizes) - 1) / 2) * thickness
        colours = PEER_COLOURS if row["is_peer"] else OUR_COLOURS
        value = row.get(key)
        label = f" mb {row['micro_batch']}: " + (row["failed"] if value is None else form.format(value))
        if value is not None:
            axes.barh(middle, value, thickness * 0.92, color=colours[min(place, 2)], edgecolor="white")
        axes.text(value or 0, middle, label, va="center", fontsize=7.5, color=INK)
    axes.margins(x=0.28)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=MUTED)
