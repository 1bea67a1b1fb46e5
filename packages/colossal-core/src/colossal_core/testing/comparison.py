"""A run beside its oracle: one row for each kind of thing that must be the same, with the worst difference and where it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from colossal_core.difference import EXACT, floor_for_gradients, floor_for_parameters, relative_difference
from colossal_core.testing.parity import RunRecord


@dataclass(frozen=True)
class Row:
    """The worst relative difference of one kind. where: the tensor, step and rank that have it. limit: the largest that passes."""

    kind: str
    where: str
    difference: float
    limit: float = EXACT

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit


def compare(records: RunRecord | Sequence[RunRecord], oracle: RunRecord, *, limit: float = EXACT) -> tuple[Row, ...]:
    """Rows for loss, num_tokens, grad_norm, gradient, parameter and each kind of state, worst over steps, tensors and ranks.

    records: of one rank, or of every rank in order; each one's full tensors must be the oracle's, so that copies that have drifted apart
    are seen too. What only one side has is an infinite difference. limit: of every row (num_tokens is exact anyhow).
    """
    given = (records,) if isinstance(records, RunRecord) else tuple(records)
    worst: dict[str, Row] = {}
    for rank, record in enumerate(given):
        at = "" if len(given) == 1 else f" on rank {rank}"
        for row in _rows(record, oracle, at, limit):
            if row.kind not in worst or row.difference > worst[row.kind].difference:
                worst[row.kind] = row
    return tuple(worst.values())


def table(rows: Iterable[Row]) -> str:
    """The rows as aligned text under a head."""
    lines = [("", "worst difference", "limit", "where", "")]
    for row in rows:
        verdict = "" if row.passed else "DIFFERENT"
        lines.append((row.kind, f"{row.difference:.1e}", f"{row.limit:.0e}", row.where, verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _rows(record: RunRecord, oracle: RunRecord, at: str, limit: float) -> Iterable[Row]:
    if len(record.steps) != len(oracle.steps):
        yield Row("steps", f"{len(record.steps)} instead of {len(oracle.steps)}{at}", math.inf, limit)
        return
    for index, (step, true) in enumerate(zip(record.steps, oracle.steps, strict=True)):
        where = f"step {index}{at}"
        yield Row("loss", where, _number_difference(step.loss, true.loss), limit)
        yield Row("num_tokens", where, float(abs(step.num_tokens - true.num_tokens)), 0.0)
        yield Row("skipped", where, float(step.skipped != true.skipped), 0.0)
        yield Row("grad_norm", where, _number_difference(step.grad_norm, true.grad_norm), limit)
        yield from _tensor_rows("gradient", step.gradients, true.gradients, f", {where}", limit)
    yield from _parameter_rows(record.parameters, oracle.parameters, at, limit)
    for kind in dict.fromkeys(kind for kind, _ in (*oracle.states, *record.states)):
        ours = {name: tensor for (found, name), tensor in record.states.items() if found == kind}
        true_states = {name: tensor for (found, name), tensor in oracle.states.items() if found == kind}
        yield from _tensor_rows(kind, ours, true_states, at, limit)


def _tensor_rows(
    kind: str, ours: Mapping[str, torch.Tensor], true: Mapping[str, torch.Tensor], at: str, limit: float
) -> Iterable[Row]:
    floor = floor_for_gradients(true.values()) if true else 0.0
    for name in dict.fromkeys((*true, *ours)):
        yield Row(kind, f"{name}{at}", _difference(ours.get(name), true.get(name), floor), limit)


def _parameter_rows(
    ours: Mapping[str, torch.Tensor], true: Mapping[str, torch.Tensor], at: str, limit: float
) -> Iterable[Row]:
    for name in dict.fromkeys((*true, *ours)):
        floor = floor_for_parameters(true[name].numel()) if name in true else 0.0
        yield Row("parameter", f"{name}{at}", _difference(ours.get(name), true.get(name), floor), limit)


def _difference(ours: torch.Tensor | None, true: torch.Tensor | None, floor: float) -> float:
    if ours is None or true is None or ours.shape != true.shape:
        return math.inf
    return relative_difference(ours, true, floor=floor)


def _number_difference(ours: float, true: float) -> float:
    return relative_difference(torch.tensor(ours, dtype=torch.float64), torch.tensor(true, dtype=torch.float64))
