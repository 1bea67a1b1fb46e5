"""Every strategy with every other thing, beside one process in float64: the cells of the README's table.

With COLOSSAL_WRITE_WORKS_WITH=1 the results are written to docs/works_with.json; otherwise the table there must hold exactly these pairs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("colossal_zero")

from colossal_core.testing import EXACT, RunSpec, Variant, WorkerPool, verify
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches

RESULTS = Path(__file__).parents[4] / "docs" / "works_with.json"
ADAMW = {"name": "adamw", "lr": 1.0e-3, "weight_decay": 0.1, "max_grad_norm": None}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "max_grad_norm": None}


PLAIN = TinyOptions(tied=False, dropout=0.0)


@dataclass(frozen=True)
class Row:
    """A way of spreading: config overrides and a number of ranks."""

    overrides: Mapping[str, Any]
    world_size: int = 2


@dataclass(frozen=True)
class Column:
    """What it is combined with: config overrides on top, and peculiarities of the model."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    options: TinyOptions = PLAIN
    micro_size: int = 2


ROWS: Mapping[str, Row] = {
    "`zero: {stage: 0}`": Row({"parallel.zero": {"stage": 0}}),
    "`zero: {stage: 1}`": Row({"parallel.zero": {"stage": 1}}),
    "`zero: {stage: 1, replicate: 2}`": Row({"parallel.zero": {"stage": 1, "replicate": 2}}, world_size=4),
}
COLUMNS: Mapping[str, Column] = {
    "AdamW": Column({"optimizer": ADAMW}),
    "SGD": Column({"optimizer": SGD}),
    "clipping": Column({"optimizer": {**ADAMW, "max_grad_norm": 0.1}}),
    "microbatches": Column({"optimizer": ADAMW}, micro_size=1),
    "tied": Column({"optimizer": ADAMW}, TinyOptions(dropout=0.0)),
    "shared, frozen, unused": Column(
        {"optimizer": ADAMW}, TinyOptions(shared=True, frozen=True, unused=True, dropout=0.0)
    ),
    "dropout": Column({"optimizer": ADAMW}, TinyOptions(dropout=0.2), micro_size=1),
    "`recompute: full`": Column({"optimizer": ADAMW, "recompute": {"mode": "full"}}, TinyOptions(dropout=0.2)),
    "`recompute: selective`": Column(
        {"optimizer": ADAMW, "recompute": {"mode": "selective", "memory_budget": 0.5}}, TinyOptions(dropout=0.2)
    ),
    "`compile`": Column({"optimizer": ADAMW, "compile": {"enabled": True, "backend": "aot_eager"}}),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(timeout_seconds=120) as made:
        yield made


def worst_difference(row: Row, column: Column, pool: WorkerPool) -> float:
    """The largest difference from one process over loss, gradients, norm, parameters and states after two steps."""
    batch = {"global_size": 2 * row.world_size, "micro_size": column.micro_size}
    spec = RunSpec({"batch": batch}, TinyModel(column.options), TokenBatches(), num_steps=2, task="causal-lm")
    report = verify(spec, row.world_size, [Variant("cell", {**row.overrides, **column.overrides})], pool)
    assert report.passed, report.describe()
    return report.worst


@pytest.fixture(scope="module")
def cells() -> Iterator[dict[tuple[str, str], float]]:
    """Differences by cell; written to the table's file at the end, where that is asked for."""
    found: dict[tuple[str, str], float] = {}
    yield found
    if os.environ.get("COLOSSAL_WRITE_WORKS_WITH") == "1":
        rows = [
            {"row": row, "column": column, "shown": _shown(found[row, column])} for row in ROWS for column in COLUMNS
        ]
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _shown(difference: float) -> str:
    """Rounded up to a power of ten, so that the table does not change with the machine's last bits."""
    return "exact" if difference == 0.0 else f"< {10.0 ** math.ceil(math.log10(difference)):.0e}"


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
def test_cell(row: str, column: str, pool: WorkerPool, cells: dict[tuple[str, str], float]) -> None:
    cells[row, column] = worst_difference(ROWS[row], COLUMNS[column], pool)
    assert cells[row, column] <= EXACT


def test_the_table_shows_these_cells_and_no_others() -> None:
    shown = [(cell["row"], cell["column"]) for cell in json.loads(RESULTS.read_text(encoding="utf-8"))]
    assert shown == [(row, column) for row in ROWS for column in COLUMNS]
