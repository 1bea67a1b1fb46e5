"""Rows, their worst places, and the printed table."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from colossal_core.testing import Row, RunSpec, compare, table
from colossal_core.testing.parity import RunRecord, StepRecord

STEP = StepRecord(2.0, 1.0, 10, False, {"a": torch.ones(4), "b": torch.zeros(3)})
RUN = RunRecord((STEP,), {"a": torch.ones(4), "b": torch.zeros(3)}, {("adamw.exp_avg", "a"): torch.ones(4)}, "plan")


def differences(rows: tuple[Row, ...]) -> dict[str, float]:
    return {row.kind: row.difference for row in rows if not row.passed}


def test_a_run_is_the_same_as_itself() -> None:
    rows = compare(RUN, RUN)
    assert [row.kind for row in rows] == [
        "loss",
        "num_tokens",
        "skipped",
        "grad_norm",
        "gradient",
        "parameter",
        "adamw.exp_avg",
    ]
    assert all(row.passed and row.difference == 0.0 for row in rows)


def test_worst_gradient_is_named_with_step_and_rank() -> None:
    other = replace(RUN, steps=(replace(STEP, gradients={"a": torch.ones(4), "b": torch.full((3,), 1e-6)}),))
    (row,) = [row for row in compare([RUN, other], RUN) if not row.passed]
    assert (row.kind, row.where) == ("gradient", "b, step 0 on rank 1")
    assert math.isclose(row.difference, 1e-6 * math.sqrt(3) / (1e-3 * 2.0), rel_tol=1e-6)


def test_zero_parameters_are_measured_by_their_floor() -> None:
    other = replace(RUN, parameters={**RUN.parameters, "b": torch.full((3,), 1e-9)})
    assert math.isclose(differences(compare(other, RUN))["parameter"], 1e-6, rel_tol=1e-6)


def test_what_one_side_lacks_is_infinitely_different() -> None:
    assert differences(compare(replace(RUN, states={}), RUN)) == {"adamw.exp_avg": math.inf}
    assert differences(compare(RUN, replace(RUN, parameters={"a": torch.ones(4)}))) == {"parameter": math.inf}
    assert differences(compare(replace(RUN, steps=()), RUN)) == {"steps": math.inf}


def test_numbers_of_tokens_and_skips_are_exact() -> None:
    other = replace(RUN, steps=(replace(STEP, num_tokens=11, skipped=True),))
    assert differences(compare(other, RUN)) == {"num_tokens": 1.0, "skipped": 1.0}


def test_table() -> None:
    rows = [Row("loss", "step 0", 1.5e-15), Row("gradient", "a, step 1 on rank 1", 0.25)]
    assert table(rows).splitlines() == [
        "          worst difference  limit  where",
        "loss      1.5e-15           1e-12  step 0",
        "gradient  2.5e-01           1e-12  a, step 1 on rank 1  DIFFERENT",
    ]


def test_overrides_replace_by_dotted_path_and_leave_the_original_alone() -> None:
    spec = RunSpec({"batch": {"global_size": 4, "micro_size": 2}}, "m:f", "m:b")
    changed = spec.with_overrides({"batch.micro_size": 1, "parallel.zero.stage": 1})
    assert changed.config == {"batch": {"global_size": 4, "micro_size": 1}, "parallel": {"zero": {"stage": 1}}}
    assert spec.config == {"batch": {"global_size": 4, "micro_size": 2}}
