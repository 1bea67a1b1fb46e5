"""Every way of spreading with every other thing, beside one process: the cells of the README's table.

With COLOSSAL_WRITE_WORKS_WITH=1 the results are written to docs/works_with.json; otherwise the table there must hold exactly these pairs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("colossal_zero")
pytest.importorskip("colossal_tensor")
pytest.importorskip("colossal_pipeline")

from colossal_core.ops import OpImplementation
from colossal_core.testing import EXACT, RunRecord, RunSpec, WorkerPool, compare, relative_difference, table
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.op_twins import twins
from colossal_core.testing.parity import oracle_of
from colossal_core.testing.probes import record

RESULTS = Path(__file__).parents[4] / "docs" / "works_with.json"
GLOBAL_SIZE = 8
PLAIN = TinyOptions(tied=False, dropout=0.0)
DROPOUT = TinyOptions(dropout=0.2)


@dataclass(frozen=True)
class Way:
    """A way of spreading: the sections `parallel.zero`, `parallel.tensor` and `parallel.pipeline`. data_size: the ranks that get sequences
    of their own.
    """

    zero: Mapping[str, Any]
    tensor: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    data_size: int = 2

    @property
    def num_ranks(self) -> int:
        return self.data_size * int(self.tensor.get("size", 1)) * int(self.pipeline.get("size", 1))


WAYS: Mapping[str, Way] = {
    "stage 0": Way({"stage": 0}),
    "stage 1": Way({"stage": 1}),
    "stage 2": Way({"stage": 2}),
    "stage 3": Way({"stage": 3}),
    "3, kept for a microbatch": Way({"stage": 3, "keep_parameters": "microbatch"}),
    "3, kept for a step": Way({"stage": 3, "keep_parameters": "step"}),
    "1, `replicate: 2`": Way({"stage": 1, "replicate": 2}, data_size=4),
    "3, `replicate: 2`": Way({"stage": 3, "replicate": 2}, data_size=4),
    "tensor 2": Way({}, {"size": 2, "sequence_parallel": True}, data_size=1),
    "tensor 2, sequence whole": Way({}, {"size": 2, "sequence_parallel": False}, data_size=1),
    "tensor 2 x stage 1": Way({"stage": 1}, {"size": 2, "sequence_parallel": True}),
    "tensor 2 x stage 3": Way({"stage": 3}, {"size": 2, "sequence_parallel": True}),
    "pipeline 2": Way({}, pipeline={"size": 2}, data_size=1),
    "pipeline 2, split": Way({}, pipeline={"size": 2, "schedule": "zb-h1"}, data_size=1),
    "pipeline 2 x stage 1": Way({"stage": 1}, pipeline={"size": 2}),
    "pipeline 2 x stage 3": Way({"stage": 3}, pipeline={"size": 2}),
    "pipeline 2 x tensor 2": Way({}, {"size": 2, "sequence_parallel": True}, {"size": 2}, data_size=1),
}

WITHOUT_TENSOR = tuple(name for name, way in WAYS.items() if not way.tensor)
TENSOR = ("tensor 2", "tensor 2 x stage 1", "tensor 2 x stage 3")
ALL_TENSOR = tuple(name for name, way in WAYS.items() if way.tensor)
PIPELINE = tuple(name for name, way in WAYS.items() if way.pipeline)

STAGES = ("stage 0", "stage 1", "stage 2", "stage 3", "3, `replicate: 2`", *TENSOR, *PIPELINE)
"""For what does not depend on how long parameters stay."""

FEW = ("stage 1", "stage 3", "3, `replicate: 2`", "pipeline 2 x stage 1")
"""For what depends on whether masters are sharded alone."""


@dataclass(frozen=True)
class Thing:
    """What is combined with a way of spreading: config overrides by dotted path, keys of the optimizer, peculiarities of the model."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    options: TinyOptions = PLAIN
    num_microbatches: int = 1
    extra_ops: Callable[[], Sequence[OpImplementation]] | None = None
    ways: tuple[str, ...] = tuple(WAYS)

    def spec(self, way: str) -> RunSpec:
        found = WAYS[way]
        size = GLOBAL_SIZE // found.data_size // self.num_microbatches
        config: dict[str, Any] = {
            "batch": {"global_size": GLOBAL_SIZE, "micro_size": size},
            "precision": "fp64",
            "optimizer": {"name": "adamw", "lr": 1.0e-3, "max_grad_norm": None, **self._adam_eps(), **self.optimizer},
            "parallel": {
                "zero": {**found.zero, "bucket_bytes": 9000},
                "tensor": dict(found.tensor),
                "pipeline": dict(found.pipeline),
            },
        }
        spec = RunSpec(
            config, TinyModel(self.options), TokenBatches(), num_steps=2, task="causal-lm", extra_ops=self.extra_ops
        )
        return spec.with_overrides(self.overrides)

    def _adam_eps(self) -> Mapping[str, float]:
        """A key's bias has no gradient but rounding, of which AdamW makes steps of lr x rounding / eps: at 1e-8 one process differs from
        itself by 1e-12 when a product is summed in two parts.
        """
        return {} if "name" in self.optimizer else {"eps": 1.0e-6}


SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
COMPILED = {"compile": {"enabled": True, "backend": "aot_eager"}}
EXACTLY: Mapping[str, Thing] = {
    "AdamW": Thing(),
    "SGD": Thing(optimizer=SGD, ways=STAGES),
    "Lion": Thing(optimizer={"name": "lion", "betas": (0.9, 0.99)}, ways=STAGES),
    "LAMB": Thing(optimizer={"name": "lamb"}, ways=STAGES),
    "LARS": Thing(optimizer={"name": "lars", "lr": 1.0, "weight_decay": 0.01}, ways=STAGES),
    "Adafactor": Thing(optimizer={"name": "adafactor", "lr": 0.01}, ways=STAGES),
    "Muon": Thing(optimizer={"name": "muon", "lr": 0.01, "adamw_lr": 0.001}, ways=STAGES),
    "clipping": Thing(optimizer={"max_grad_norm": 0.1}, ways=STAGES),
    "microbatches": Thing(num_microbatches=2),
    "tied": Thing(options=TinyOptions(dropout=0.0), ways=STAGES),
    "shared, frozen, unused": Thing(
        options=TinyOptions(shared=True, frozen=True, unused=True, dropout=0.0), ways=WITHOUT_TENSOR
    ),
    "frozen, unused": Thing(options=TinyOptions(frozen=True, unused=True, dropout=0.0), ways=ALL_TENSOR),
    "dropout": Thing(options=DROPOUT, num_microbatches=2),
    "`recompute: full`": Thing({"recompute": {"mode": "full"}}, options=DROPOUT, num_microbatches=2),
    "`recompute: selective`": Thing(
        {"recompute": {"mode": "selective"}}, options=DROPOUT, num_microbatches=2, ways=STAGES
    ),
    "`compile`": Thing(COMPILED, options=DROPOUT, num_microbatches=2, ways=STAGES),
    "ops in the model": Thing(num_microbatches=2, ways=STAGES, extra_ops=twins),
}
"""Beside one process in float64."""

AS_NEAR: Mapping[str, Thing] = {
    "`precision: fp32`": Thing({"precision": "fp32"}, ways=STAGES),
    "`precision: bf16`": Thing({"precision": "bf16"}, ways=STAGES),
    "`precision: fp16`": Thing({"precision": "fp16"}, ways=STAGES),
    "`reduce_dtype: bf16`": Thing({"precision": "bf16", "parallel.zero.reduce_dtype": "bf16"}, ways=STAGES),
    "`states: bf16`": Thing({"precision": "bf16"}, {"states": "bf16"}, ways=FEW),
    "`states: int8`": Thing({"precision": "bf16"}, {"states": "int8"}, ways=FEW),
    "`masters: compute`": Thing({"precision": "bf16"}, {"masters": "compute"}, ways=FEW),
}
"""In formats that round: how far from float64, beside how far one process with the same config is."""

MOST_TIMES = 2.0
THINGS = {**EXACTLY, **AS_NEAR}
PAIRS = [(thing, way) for thing, found in THINGS.items() for way in found.ways]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool() as made:
        yield made


@pytest.fixture(scope="module")
def cells() -> Iterator[dict[tuple[str, str], str]]:
    """What each cell shows; written to the table's file at the end, where that is asked for."""
    found: dict[tuple[str, str], str] = {}
    yield found
    if os.environ.get("COLOSSAL_WRITE_WORKS_WITH") == "1":
        rows = [{"row": thing, "column": way, "shown": found[thing, way]} for thing, way in PAIRS]
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def shown(difference: float) -> str:
    """Rounded up to a power of ten, so that the table does not change with the machine's last bits."""
    return "exact" if difference == 0.0 else f"< {10.0 ** math.ceil(math.log10(difference)):.0e}"


@pytest.mark.timeout(900)  # a dozen runs, each of which the pool limits; compiling takes minutes on a slow machine
@pytest.mark.parametrize("name", EXACTLY)
def test_is_exact(name: str, pool: WorkerPool, cells: dict[tuple[str, str], str]) -> None:
    """Loss, gradients, norm, parameters and states on every rank after two steps."""
    thing = EXACTLY[name]
    oracle = pool.run(1, record, oracle_of(thing.spec(thing.ways[0])))[0]
    for way in thing.ways:
        rows = compare(pool.run(WAYS[way].num_ranks, record, thing.spec(way)), oracle)
        worst = max(row.difference for row in rows)
        assert worst <= EXACT, f"{way}\n{table(rows)}"
        cells[name, way] = shown(worst)


def vectors(run: RunRecord) -> list[torch.Tensor]:
    """The gradients of each step, and the parameters at the end, as one vector each."""
    kinds = [list(step.gradients.values()) for step in run.steps] + [list(run.parameters.values())]
    return [torch.cat([tensor.double().reshape(-1) for tensor in kind]) for kind in kinds]


@pytest.mark.parametrize("name", AS_NEAR)
def test_is_as_near_as_one_process(name: str, pool: WorkerPool, cells: dict[tuple[str, str], str]) -> None:
    """At most twice as far from the float64 run, in every gradient and in the parameters; no step is skipped."""
    thing = AS_NEAR[name]
    first = thing.spec(thing.ways[0])
    truth = pool.run(1, record, oracle_of(first))[0]
    alone = pool.run(1, record, replace(first, is_oracle=True))[0]
    for way in thing.ways:
        run = pool.run(WAYS[way].num_ranks, record, thing.spec(way))[0]
        assert not any(step.skipped for step in run.steps), way
        for ours, near, true in zip(vectors(run), vectors(alone), vectors(truth), strict=True):
            times = relative_difference(ours, true) / relative_difference(near, true)
            assert 0.0 < times <= MOST_TIMES, (way, times)
        cells[name, way] = f"≤ {MOST_TIMES:g}×"


@pytest.mark.skipif(os.environ.get("COLOSSAL_WRITE_WORKS_WITH") == "1", reason="it is being written")
def test_the_table_shows_these_cells_and_no_others() -> None:
    found = [(cell["row"], cell["column"]) for cell in json.loads(RESULTS.read_text(encoding="utf-8"))]
    assert found == PAIRS
