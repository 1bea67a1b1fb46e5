"""Planted faults, those of pipelines and those of core, in a run of two stages and two data shares: each is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

pytest.importorskip("colossal_zero")

from colossal_core.testing import (
    Oracles,
    RankError,
    RunSpec,
    WorkerPool,
    compare,
    default_variants,
    model_size_of,
    verify,
)
from colossal_core.testing.mutants import MUTANTS, PIPELINE_MUTANTS
from colossal_core.testing.parity import prepare
from colossal_core.testing.probes import record
from colossal_core.testing.verification import num_microbatches_of, with_mutant

Run = Callable[..., RunSpec]


RANKS = 4
PARALLEL = {"parallel.pipeline": {"size": 2}, "parallel.zero": {"stage": 1}}


@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS])
def test_a_planted_fault_is_seen(run_of: Run, oracles: Oracles, pool: WorkerPool, name: str) -> None:
    """GPT-2's head is its table of words, which both stages hold. Copies of shards, without which no norm counts twice, are in stage 0."""
    parallel = {**PARALLEL, "parallel.zero": {"stage": 0 if name == "doubled-norm" else 1}}
    spec = replace(run_of("gpt2", parallel), mutant=name)
    planted = next(mutant for mutant in MUTANTS if mutant.name == name)
    assert planted.applies(prepare(spec, RANKS).plan)
    try:
        found = pool.run(RANKS, record, spec)
    except RankError:
        return
    assert not all(row.passed for row in compare(found, oracles.of(spec)))


def test_stages_alone_have_fewer_faults(run_of: Run) -> None:
    """Without ranks of different data nothing is summed over them; an untied model has nothing that two stages share."""
    alone = prepare(run_of("llama", {"parallel.pipeline": {"size": 2}}), 2).plan
    assert [mutant.name for mutant in PIPELINE_MUTANTS if mutant.applies(alone)] == [
        "halved-crossing-gradient",
        "repeated-microbatch",
    ]
    not_summed = {"forgotten-all-reduce", "doubled-gradient", "mean-of-ranks"}
    assert not_summed.isdisjoint(mutant.name for mutant in MUTANTS if mutant.applies(alone))


def test_verify_runs_stages_beside_data_shares(run_of: Run, pool: WorkerPool) -> None:
    """The variants of `colossal verify`: the run as it is, and one microbatch."""
    sizes = {"pp": 2}
    variants = default_variants(RANKS, model_size_of(sizes, RANKS), num_microbatches_of(sizes))
    chosen = [variant for variant in variants if variant.name.startswith(("as configured", "stage 1, AdamW"))]
    assert [variant.name for variant in chosen] == [
        "as configured, 5 microbatches",
        "stage 1, AdamW, 5 microbatches",
        "stage 1, AdamW, 1 microbatch",
    ]
    spec = run_of("gpt2", PARALLEL)
    report = verify(spec, RANKS, chosen, pool)
    assert report.passed, report.describe()
    faulty = verify(with_mutant(spec, "halved-crossing-gradient"), RANKS, chosen[:1], pool)
    assert [result.passed for result in faulty.results] == [False]
