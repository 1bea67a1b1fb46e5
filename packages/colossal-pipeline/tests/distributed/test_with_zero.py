"""A pipeline beside data parallelism: every ZeRO stage inside the pipeline's stages, compared with one process in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colossal_core.memory_report import changes
from colossal_core.testing import RunSpec
from colossal_core.testing.parity import prepare
from colossal_pipeline.trace import Trace

pytest.importorskip("colossal_zero")

Run = Callable[..., RunSpec]
Exact = Callable[[RunSpec, int], None]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved", "zbv"])
def test_every_stage(run_of: Run, exact: Exact, schedule: str, stage: int) -> None:
    """Two copies of a pipeline of two ranks, three microbatches each."""
    overrides: dict[str, Any] = {
        "parallel.pipeline": {"size": 2, "schedule": schedule},
        "parallel.zero": {"stage": stage},
        "batch": {"global_size": 6, "micro_size": 1},
    }
    exact(run_of("llama", overrides), 4)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_gradients_that_every_backward_pass_reduces(run_of: Run, exact: Exact, schedule: str, stage: int) -> None:
    overrides = {
        "parallel.pipeline": {"size": 2, "schedule": schedule},
        "parallel.zero": {"stage": stage, "keep_gradients": "microbatch"},
    }
    exact(run_of("llama", overrides, microbatches=8), 4)


@pytest.mark.parametrize(
    ("schedule", "stage", "recompute"), [("zb-h1", 0, "full"), ("zb-h1", 3, "none"), ("zbv", 3, "selective")]
)
def test_compiled_blocks_in_two_parts(run_of: Run, exact: Exact, schedule: str, stage: int, recompute: str) -> None:
    overrides: dict[str, Any] = {
        "parallel.pipeline": {"size": 2, "schedule": schedule},
        "parallel.zero": {"stage": stage},
        "compile": {"enabled": True, "backend": "aot_eager"},
        "recompute": {"mode": recompute},
    }
    exact(run_of("llama", overrides), 4)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_tied_embeddings(run_of: Run, exact: Exact, schedule: str, stage: int) -> None:
    overrides: dict[str, Any] = {
        "parallel.pipeline": {"size": 2, "schedule": schedule},
        "parallel.zero": {"stage": stage},
    }
    exact(run_of("gpt2", overrides), 4)


def test_hybrid_sharding_beside_tied_embeddings(run_of: Run, exact: Exact) -> None:
    """The gradient of the tied table is summed over its stages and over the replicas at once."""
    overrides: dict[str, Any] = {
        "parallel.pipeline": {"size": 2},
        "parallel.zero": {"stage": 1, "replicate": 2},
        "batch": {"global_size": 4, "micro_size": 1},
    }
    exact(run_of("gpt2", overrides), 4)


@pytest.mark.parametrize("optimizer", ["lion", "lamb", "lars", "adafactor", "muon"])
def test_every_optimizer(run_of: Run, exact: Exact, optimizer: str) -> None:
    """Whole matrices and their norms are those of one process, where ranks hold different parameters."""
    overrides: dict[str, Any] = {"parallel.pipeline": {"size": 2}, "parallel.zero": {"stage": 1}}
    exact(run_of("gpt2", overrides, optimizer=optimizer), 4)


@pytest.mark.parametrize(("schedule", "stage"), [("interleaved", 3), ("zbv", 1)])
def test_a_recorded_step_has_every_action_once(
    run_of: Run, exact: Exact, schedule: str, stage: int, tmp_path: Path
) -> None:
    overrides: dict[str, Any] = {
        "parallel.pipeline": {"size": 2, "schedule": schedule, "record_step": 2},
        "parallel.zero": {"stage": stage},
        "checkpoint.directory": str(tmp_path),
    }
    spec = run_of("llama", overrides)
    exact(spec, 2)
    Trace.read(tmp_path / "pipeline-step-2.json").check(prepare(spec, 2).plan.program)


def test_a_step_out_of_memory_is_offered_shards_of_gradients(run_of: Run) -> None:
    """Which a pipeline does not keep by itself; and not to gather parameters for each use, which it cannot do."""

    def offered(**zero: Any) -> list[str]:
        spec = run_of("llama", {"parallel.pipeline": {"size": 2}, "parallel.zero": zero}, microbatches=8)
        found = [str(change) for change in changes(prepare(spec, 4).plan, training=True)]
        return [change for change in found if change.startswith("parallel.zero")][: 2 * (4 - zero["stage"]) - 1]

    shards = "parallel.zero.keep_gradients: microbatch"
    assert offered(stage=3)[:1] == [shards]
    assert offered(stage=3, keep_gradients="microbatch") == []
    assert offered(stage=2)[:3] == [shards, "parallel.zero.stage: 3", f"parallel.zero.stage: 3, {shards}"]
