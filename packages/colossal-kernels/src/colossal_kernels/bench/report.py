"""The table as rows come in, what they say in short, and JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from colossal_kernels.bench.case import Least
from colossal_kernels.bench.clock import Ceilings
from colossal_kernels.bench.measure import Row

COLUMNS = (
    "op",
    "contestant",
    "ms",
    "rate",
    "% of ceiling",
    "% of a copy as large",
    "extra MiB",
    "error",
    "host ms",
    "ours is",
)
LEAST_RATIO = 0.95
"""No shape may be slower than this share of the fastest other's speed."""


def head() -> str:
    return f"| {' | '.join(COLUMNS)} |\n|{'|'.join(['---', '---', *['---:'] * (len(COLUMNS) - 2)])}|"


def title(row: Row) -> str:
    return f"{row.op} {row.direction} {row.shape}"


def line(row: Row, ours: Row | None, ceilings: Ceilings) -> str:
    """ours: the row of the same shape and direction that this one is compared with, the fastest of ours."""
    if row.failed:
        return f"| {title(row)} | {row.contestant} | {row.failed} |"
    beside = ours is not None and not ours.failed and not row.ours
    cells = [
        title(row),
        row.contestant,
        f"{row.median_ms:.4g}",
        _rate(row),
        _percent(share_of_ceiling(row, ceilings)),
        "-" if row.least.flops else _percent(row.bytes_per_s / row.copy_bytes_per_s),
        f"{row.extra_bytes / (1 << 20):.0f}",
        "-" if math.isnan(row.error) else f"{row.error:.1e}",
        f"{row.host_ms:.3f}",
        f"{row.median_ms / ours.median_ms:.2f} x as fast" if beside and ours is not None else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _rate(row: Row) -> str:
    if row.least.flops:
        return f"{row.flops_per_s / 1e12:.0f} TFLOP/s"
    return bandwidth(row.bytes_per_s)


def bandwidth(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e12:.3f} TB/s" if bytes_per_s >= 1e11 else f"{bytes_per_s / 1e9:.3g} GB/s"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}"


def share_of_ceiling(row: Row, ceilings: Ceilings) -> float:
    """Of the matrix rate where the op is products, else of the large copy's."""
    if row.least.flops:
        return row.flops_per_s / ceilings.matmul if ceilings.matmul else math.nan
    return row.bytes_per_s / ceilings.copy


def fastest(rows: Iterable[Row]) -> Row | None:
    return min((row for row in rows if not row.failed), key=lambda row: row.median_ms, default=None)


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """By op, shape and direction, in the order of measurement."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.op, row.shape, row.direction), []).append(row)
    return found


def summary(rows: Sequence[Row], ceilings: Ceilings) -> list[str]:
    """A line for each op, shape and direction: ours, its share of what is possible, the fastest other, and the goals that it misses."""
    lines = []
    ratios: dict[str, list[tuple[float, str]]] = {}
    for group in grouped(rows).values():
        mine = fastest(row for row in group if row.ours)
        other = fastest(row for row in group if not row.ours)
        if mine is None:
            failed = next((row for row in group if row.ours), None)
            lines.append(f"{title(group[0])}: none of ours" + (f": {failed.failed}" if failed else ""))
            continue
        said = f"{title(mine)}: {mine.contestant} {mine.median_ms:.4g} ms, {_rate(mine)}, {_reached(mine, ceilings)}"
        if other is not None:
            ratio = other.median_ms / mine.median_ms
            ratios.setdefault(mine.op, []).append((ratio, f"{mine.direction} {mine.shape}"))
            said += f"; {ratio:.2f} x {other.contestant} ({other.median_ms:.4g} ms)"
        lines.append(said + "".join(f"; {missed}" for missed in missed_goals(mine, ceilings)))
    return [*lines, *_verdicts(ratios)]


def _reached(row: Row, ceilings: Ceilings) -> str:
    if row.least.flops:
        return f"{_percent(share_of_ceiling(row, ceilings))} % of the product"
    return f"{_percent(row.bytes_per_s / row.copy_bytes_per_s)} % of a copy as large"


GOALS_OF = "H200"


def missed_goals(row: Row, ceilings: Ceilings) -> list[str]:
    """Nothing where they were not set for this device."""
    least, found = row.least, []
    if GOALS_OF not in ceilings.device_name:
        return []
    if least.goal_ms is not None and row.median_ms > least.goal_ms:
        found.append(f"GOAL MISSED: {least.goal_ms:g} ms")
    if least.goal_extra_bytes is not None and row.extra_bytes > least.goal_extra_bytes:
        found.append(
            f"GOAL MISSED: {least.goal_extra_bytes / (1 << 20):.0f} MiB more, {row.extra_bytes / (1 << 20):.0f} here"
        )
    reached = share_of_ceiling(row, ceilings) if least.flops else row.bytes_per_s / row.copy_bytes_per_s
    if least.goal_share is not None and reached < least.goal_share:
        found.append(f"GOAL MISSED: {100 * least.goal_share:.0f} %")
    return found


def _verdicts(ratios: Mapping[str, Sequence[tuple[float, str]]]) -> list[str]:
    lines = []
    for op, found in ratios.items():
        lost = [f"{where} ({ratio:.2f})" for ratio, where in found if ratio < LEAST_RATIO]
        median = statistics.median(ratio for ratio, _ in found)
        said = f"{op}: {median:.2f} x the fastest other in the median"
        lines.append(said + (f"; LOST: {', '.join(lost)}" if lost else "; no shape lost"))
    return lines


def formulas(rows: Sequence[Row]) -> list[str]:
    """What was counted as the least work, once for each op and direction."""
    found: dict[tuple[str, str], Least] = {}
    for row in rows:
        found.setdefault((row.op, row.direction), row.least)
    return [f"{op} {direction}: {least.formula}" for (op, direction), least in found.items()]


def to_json(rows: Sequence[Row], ceilings: Ceilings, machine: Mapping[str, Any]) -> str:
    """Everything, with what was derived. Numbers that there are none of are null."""
    listed = [
        {
            **asdict(row),
            "bytes_per_s": row.bytes_per_s,
            "flops_per_s": row.flops_per_s,
            "share_of_ceiling": share_of_ceiling(row, ceilings),
            "share_of_copy_as_large": row.bytes_per_s / row.copy_bytes_per_s,
            "missed_goals": missed_goals(row, ceilings) if row.ours and not row.failed else [],
        }
        for row in rows
    ]
    reached = {"copy_bytes_per_s": ceilings.copy, "matmul_flops_per_s": ceilings.matmul}
    return json.dumps(_without_nan({"machine": dict(machine), "ceilings": reached, "rows": listed}), indent=1)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
