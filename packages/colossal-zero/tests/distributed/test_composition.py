"""Every stage together with recomputation, compilation, and gradients that are sent in bf16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from colossal_core.testing import RunSpec, WorkerPool, compare, relative_difference, table
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.parity import RunRecord, oracle_of
from colossal_core.testing.probes import record

POLICIES: tuple[dict[str, Any], ...] = (
    {"stage": 0},
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 3, "keep_parameters": "microbatch"},
    {"stage": 3, "keep_parameters": "step"},
    {"stage": 3, "keep_parameters": "step", "keep_gradients": "step"},
)


def spec_of(zero: Mapping[str, Any], world_size: int = 2, **sections: Any) -> RunSpec:
    config = {
        "batch": {"global_size": 2 * world_size, "micro_size": 1},
        "precision": "fp64",
        "optimizer": {"lr": 0.001, "max_grad_norm": 0.1},
        "parallel": {"zero": {"bucket_bytes": 9000, **zero}},
    }
    return RunSpec({**config, **sections}, TinyModel(TinyOptions(dropout=0.1)), TokenBatches(), task="causal-lm")


def check(pool: WorkerPool, spec: RunSpec, world_size: int) -> None:
    oracle = pool.run(1, record, oracle_of(spec))[0]
    rows = compare(pool.run(world_size, record, spec), oracle)
    assert all(row.passed for row in rows), f"\n{table(rows)}"


@pytest.mark.parametrize("zero", POLICIES, ids=lambda zero: "-".join(map(str, zero.values())))
def test_recompute_and_compile_are_exact(pool: WorkerPool, zero: dict[str, Any]) -> None:
    """Both at once; each alone is a row of the README's table, whose test is colossal-launch's."""
    compiled = {"enabled": True, "backend": "aot_eager"}
    check(pool, spec_of(zero, compile=compiled, recompute={"mode": "full"}), 2)


def _vectors(run: RunRecord) -> list[torch.Tensor]:
    """The gradients of each step, and the parameters at the end, as one vector each."""
    kinds = [list(step.gradients.values()) for step in run.steps] + [list(run.parameters.values())]
    return [torch.cat([tensor.double().reshape(-1) for tensor in kind]) for kind in kinds]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_sent_in_bf16_stay_near_the_truth(pool: WorkerPool, stage: int) -> None:
    """On four ranks, at most twice as far from the float64 run as the unsharded bf16 run is."""
    spec = spec_of({"stage": stage, "reduce_dtype": "bf16"}, 4).with_overrides({"precision": "bf16"})
    plain = spec_of({"stage": stage}, 4).with_overrides({"precision": "bf16"})
    truth = pool.run(1, record, oracle_of(plain))[0]
    alone = pool.run(1, record, replace(plain, is_oracle=True))[0]
    sharded = pool.run(4, record, spec)[0]
    ratios = [
        relative_difference(ours, wanted) / relative_difference(near, wanted)
        for wanted, near, ours in zip(_vectors(truth), _vectors(alone), _vectors(sharded), strict=True)
    ]
    assert 0.0 < max(ratios) <= 2.0, ratios
