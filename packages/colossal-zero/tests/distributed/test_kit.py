"""The kit itself: a planted fault is seen by the suite and by `verify`, and the pool tells whose fault it was."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from colossal_core.errors import ConfigError
from colossal_core.testing import RankError, RunSpec, WorkerPool, default_variants, verify
from colossal_core.testing.models import TinyModel, TokenBatches
from colossal_core.testing.mutants import MUTANTS, PIPELINE_MUTANTS
from colossal_core.testing.parity import share_of_step, start
from colossal_core.testing.suites import StrategySuite
from colossal_core.testing.verification import with_mutant

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

NEEDS_STAGE = {"doubled-norm": 0}
"""Faults that change nothing in stage 1 without copies."""


@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS if mutant not in PIPELINE_MUTANTS])
def test_suite_rejects_a_planted_fault(pool: WorkerPool, name: str) -> None:
    stage = NEEDS_STAGE.get(name, 1)

    class Faulty(StrategySuite):
        plugin = "zero"
        section = "parallel.zero"
        config = {"stage": stage, "bucket_bytes": 9000}
        axes = ("dp_replicate", "dp_shard", "cp")
        mutant = name

    Faulty.name = "zero"
    with pytest.raises(AssertionError, match="DIFFERENT"):
        Faulty().test_matches_the_oracle(pool, 2, "adamw")


def spec() -> RunSpec:
    zero = {"zero": {"bucket_bytes": 9000}}
    return RunSpec({"batch": {"global_size": 4}, "parallel": zero}, TinyModel(), TokenBatches(), task="causal-lm")


def test_verify_says_what_it_compared(pool: WorkerPool) -> None:
    report = verify(spec(), 2, default_variants(2), pool)
    assert report.passed, report.describe()
    last = report.describe().splitlines()[-1]
    assert last == f"2 ranks against one process, 10 variants: the same, worst difference {report.worst:.1e}"
    assert {row.kind for row in report.results[0].rows} == {
        "loss", "num_tokens", "skipped", "grad_norm", "gradient", "parameter", "adamw.step", "adamw.exp_avg", "adamw.exp_avg_sq",
        "step.skipped_steps",
    }  # fmt: skip


def test_verify_compares_a_run_that_sends_in_bf16(pool: WorkerPool) -> None:
    """What has no meaning in float64 is left out of the comparison, not refused."""
    run = spec().with_overrides({"precision": "bf16", "parallel.zero.reduce_dtype": "bf16"})
    report = verify(run, 2, default_variants(2)[:1], pool)
    assert report.results[0].variant.name == "as configured, 2 microbatches"
    assert report.passed, report.describe()


def test_verify_rejects_a_planted_fault(pool: WorkerPool) -> None:
    report = verify(with_mutant(spec(), "shard-off-by-one"), 2, default_variants(2), pool)
    sharded = [result.variant.name for result in report.results if "stage 0" not in result.variant.name][1:]
    assert [result.variant.name for result in report.results if not result.passed] == sharded
    assert len(sharded) == 7
    last = report.describe().splitlines()[-1]
    assert last == f"2 ranks against one process, 10 variants: different in {'; '.join(sharded)}"


def self_verified(collectives: Collectives, run: RunSpec) -> float:
    trained = start(run, collectives)
    trained.train_step(share_of_step(run, trained.plan, collectives.rank, 0))
    return trained.verify(share_of_step(run, trained.plan, collectives.rank, 1))


def test_trained_verifies_itself(pool: WorkerPool) -> None:
    exact = spec().with_overrides({"precision": "fp64"})
    assert max(pool.run(2, self_verified, exact)) <= 1e-12
    assert min(pool.run(2, self_verified, with_mutant(exact, "stale-parameters"))) > 1e-6


def fail_on_rank_1(collectives: Collectives) -> None:
    if collectives.rank == 1:
        raise ValueError("this rank is broken")
    collectives.barrier(("dp_shard",))


def test_first_failing_rank_comes_first() -> None:
    with WorkerPool(timeout_seconds=20.0) as own, pytest.raises(RankError) as raised:
        own.run(2, fail_on_rank_1)
    lines = str(raised.value).splitlines()
    assert raised.value.rank == 1
    assert lines[0] == "rank 1 failed:"
    assert "ValueError: this rank is broken" in lines
    assert lines[-1].startswith("rank 0 ")
    assert isinstance(raised.value.__cause__, ValueError)


def wait_on_rank_0(collectives: Collectives) -> None:
    if collectives.rank == 0:
        collectives.start_all_reduce(torch.zeros(1), "dp_shard").wait()
    else:
        while True:
            pass


def process_id(collectives: Collectives) -> int:
    del collectives
    return os.getpid()


def test_a_hang_is_ended_and_the_pool_goes_on() -> None:
    with WorkerPool(timeout_seconds=3.0) as own:
        before = own.run(2, process_id)
        assert own.run(2, process_id) == before
        with pytest.raises(RankError):
            own.run(2, wait_on_rank_0)
        after = own.run(2, process_id)
    assert not set(before) & set(after)
    assert not any(_is_alive(process) for process in (*before, *after))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_wrong_config_on_a_rank_is_a_config_error(pool: WorkerPool) -> None:
    wrong = spec().with_overrides({"batch.global_size": 3})
    with pytest.raises(ConfigError) as raised:
        pool.run(2, self_verified, wrong)
    assert str(raised.value) == "batch.global_size=3: is not divided by the 2 data-parallel ranks: use 2 or 4"
