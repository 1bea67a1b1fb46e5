"""`verify`: a model's training on several ranks compared with one process, variant by variant. Behind `colossal verify`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from colossal_core.mesh import DATA_AXES
from colossal_core.plan import mesh_of
from colossal_core.testing.comparison import Row, compare, table
from colossal_core.testing.parity import RunRecord, RunSpec, oracle_of, record_run
from colossal_core.testing.pool import RankError, WorkerPool

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

SGD: Mapping[str, Any] = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "max_grad_norm": 0.1}
ADAMW: Mapping[str, Any] = {"name": "adamw", "lr": 0.001, "weight_decay": 0.1, "max_grad_norm": 0.1}
"""Optimizers of the variants. The norm's limit is small, so that clipping happens."""


@dataclass(frozen=True)
class Variant:
    """One comparison. name: as the report prints it. overrides: config values by dotted path, on top of the run's own. num_microbatches:
    of a step on every rank, by these; 0: not known.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    num_microbatches: int = 0


@dataclass(frozen=True)
class VariantResult:
    """What one variant gave. error: what made it fail to run at all (only under a planted fault), else ""."""

    variant: Variant
    rows: tuple[Row, ...]
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error and all(row.passed for row in self.rows)


@dataclass(frozen=True)
class VerifyReport:
    """All variants of one verification."""

    world_size: int
    results: tuple[VariantResult, ...]

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    @property
    def worst(self) -> float:
        """The largest difference of all."""
        return max((row.difference for result in self.results for row in result.rows), default=0.0)

    def describe(self) -> str:
        """One table for each variant, and a last line with the verdict."""
        parts = []
        for result in self.results:
            head = f"{result.variant.name}: {'same' if result.passed else 'DIFFERENT'}"
            parts.append(f"{head}\n{result.error or table(result.rows)}")
        different = [result.variant.name for result in self.results if not result.passed]
        compared = f"{self.world_size} ranks against one process, {len(self.results)} variants"
        verdict = (
            f"different in {'; '.join(different)}" if different else f"the same, worst difference {self.worst:.1e}"
        )
        return "\n\n".join([*parts, f"{compared}: {verdict}"])


def default_variants(world_size: int, model_size: int = 1, num_microbatches: int = 2) -> tuple[Variant, ...]:
    """The run as it is configured, with its own strategies and optimizer; then every stage with AdamW, some with SGD, two microbatches a
    rank; one microbatch; parameters gathered once a step; hybrid sharding where the ranks of different data divide by two.

    model_size: ranks that the run's own config gives one and the same data (the sizes of `parallel.tensor` and `parallel.pipeline`;
    `model_size_of`). Together they have one sequence a microbatch. num_microbatches: of a step (`num_microbatches_of`).
    """
    data_size, count = world_size // model_size, num_microbatches
    batch = {"batch": {"global_size": count * data_size, "micro_size": 1}}
    whole = {"batch": {"global_size": count * data_size, "micro_size": count}}

    def variant(name: str, zero: Mapping[str, Any], optimizer: Mapping[str, Any], cut: Mapping[str, Any]) -> Variant:
        values = {**cut, "parallel.zero": dict(zero), "optimizer": dict(optimizer)}
        return Variant(name, values, 1 if cut is whole else count)

    # float64 has no wire format to be narrowed to: the option would be refused.
    several = f"{count} microbatches"
    variants = [Variant(f"as configured, {several}", {**batch, "parallel.zero.reduce_dtype": None}, count)]
    variants += [variant(f"stage {stage}, AdamW, {several}", {"stage": stage}, ADAMW, batch) for stage in range(4)]
    variants += [variant(f"stage {stage}, SGD, {several}", {"stage": stage}, SGD, batch) for stage in (0, 1, 3)]
    variants.append(variant("stage 1, AdamW, 1 microbatch", {"stage": 1}, ADAMW, whole))
    once = {"stage": 3, "keep_parameters": "step"}
    variants.append(variant(f"stage 3 gathered once a step, AdamW, {several}", once, ADAMW, batch))
    if data_size % 2 == 0 and data_size > 2:
        for stage in (1, 3):
            hybrid = {"stage": stage, "replicate": 2}
            variants.append(variant(f"stage {stage} in 2 copies, AdamW, {several}", hybrid, ADAMW, batch))
    return tuple(variants)


def num_microbatches_of(axis_sizes: Mapping[str, int]) -> int:
    """How many microbatches show what a run does: two accumulate; in a pipeline one more than there are stages with two on each rank, so
    that every rank comes to a steady state, and their number divides by nothing.
    """
    stages = axis_sizes.get("pp", 1)
    return 2 * stages + 1 if stages > 1 else 2


def model_size_of(axis_sizes: Mapping[str, int], world_size: int) -> int:
    """How many ranks have the same data, of the sizes of axes that a config asks for. Raises: ConfigError where the ranks do not divide."""
    mesh = mesh_of({axis: size for axis, size in axis_sizes.items() if axis not in DATA_AXES}, world_size)
    return world_size // mesh.size(DATA_AXES)


def verify(spec: RunSpec, world_size: int, variants: Sequence[Variant], pool: WorkerPool) -> VerifyReport:
    """Runs every variant of `spec` in float64 on `world_size` ranks and compares every rank with the oracle. Ops are the references, which
    alone compute so on the CPU, whatever the run asks for.

    Variants that differ only in `parallel`, `recompute` and `compile` share one oracle run.

    Raises: ConfigError where a variant cannot be planned; RankError where a rank fails, unless a fault is planted, for then failing is
    one way of being seen.
    """
    oracles: dict[str, RunRecord] = {}
    results = []
    for variant in variants:
        ours = spec.with_overrides({"precision": "fp64", "ops": {}, **variant.overrides})
        key = _oracle_key(ours)
        if key not in oracles:
            oracles[key] = pool.run(1, _record, oracle_of(ours))[0]
        try:
            records = pool.run(world_size, _record, ours)
        except RankError as error:
            if spec.mutant is None:
                raise
            results.append(VariantResult(variant, (), str(error)))
            continue
        results.append(VariantResult(variant, compare(records, oracles[key])))
    return VerifyReport(world_size, tuple(results))


def _record(collectives: Collectives, spec: RunSpec) -> RunRecord:
    return record_run(spec, collectives)


def _oracle_key(spec: RunSpec) -> str:
    kept = {
        name: value
        for name, value in oracle_of(spec).config.items()
        if name not in ("parallel", "recompute", "compile")
    }
    return json.dumps(kept, sort_keys=True)


def with_mutant(spec: RunSpec, name: str | None) -> RunSpec:
    """The run with a fault planted on its ranks; the oracle stays as it is. Raises: ConfigError for an unknown name."""
    if name is not None:
        from colossal_core.testing.mutants import plant

        plant(name)
    return replace(spec, mutant=name)
