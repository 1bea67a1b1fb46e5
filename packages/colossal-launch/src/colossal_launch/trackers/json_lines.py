"""`metrics.jsonl`: one JSON object a line, on disk as soon as it is logged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colossal_launch.trackers.protocol import Metrics


class JsonLinesTracker:
    """Appends to `path`. resumed_step: finished steps that the run starts from; later lines are of steps that are taken again, and go.

    A last line that a killed process left unfinished goes too. Numbers that are not finite are written as null.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            kept = [line for line in read_metrics(path) if line["step"] <= resumed_step]
            aside = path.with_name(f"{path.name}.tmp")
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            aside.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        line = {"step": step, **{name: _finite(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finite(value: float | int | bool) -> float | int | bool | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, up to the first that is not whole."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return
