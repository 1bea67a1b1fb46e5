"""Models of transformers that use ops in the place of their own code, under every way of spreading, beside one process in float64 with the
code as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("transformers", reason="builds models of transformers")
pytest.importorskip("colossal_zero")
pytest.importorskip("colossal_tensor")
pytest.importorskip("colossal_pipeline")

from colossal_core.model_ops.replacing import chosen_in
from colossal_core.testing import EXACT, RunSpec, WorkerPool, compare
from colossal_core.testing.parity import oracle_of, prepare
from colossal_core.testing.probes import record
from colossal_launch.models.small import SmallBatches, SmallModel

LLAMA = SmallModel("llama")

REPLACED: Mapping[SmallModel, Mapping[str, int]] = {
    LLAMA: {"rms_norm": 5, "add_rms_norm": 2, "rotary": 2, "swiglu": 2, "linear_cross_entropy": 1},
    SmallModel("gemma2"): {"rms_norm": 9, "add_rms_norm": 2, "rotary": 2, "geglu": 2},
    SmallModel("qwen3"): {"rms_norm": 9, "add_rms_norm": 2, "rotary": 2, "swiglu": 2, "linear_cross_entropy": 1},
    SmallModel("gpt2"): {"layer_norm": 5, "linear_cross_entropy": 1},
    SmallModel("phi3"): {"rms_norm": 5, "add_rms_norm": 2, "rotary": 2, "packed_swiglu": 2, "linear_cross_entropy": 1},
    SmallModel("umt5", "seq2seq-lm"): {"rms_norm": 12, "geglu": 4, "linear_cross_entropy": 1},
    SmallModel("deepseek_v3"): {
        "rms_norm": 9,
        "add_rms_norm": 2,
        "rotary": 2,
        "swiglu": 2,
        "experts": 1,
        "linear_cross_entropy": 1,
    },
    SmallModel("bert", "masked-lm"): {"layer_norm": 6, "add_layer_norm": 4},
}
"""Models, and in how many of their modules which op is used where nothing is in the way."""


@dataclass(frozen=True)
class Way:
    """config: sections, by dotted path. without: ops that stay out."""

    num_ranks: int
    config: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()


WAYS = {
    "stage 1": Way(2, {"parallel.zero": {"stage": 1}}),
    "stage 3": Way(2, {"parallel.zero": {"stage": 3}}),
    "tensor 2": Way(2, {"parallel.tensor": {"size": 2, "sequence_parallel": False}}, ("linear_cross_entropy",)),
    "tensor 2, sequence": Way(
        2, {"parallel.tensor": {"size": 2, "sequence_parallel": True}}, ("linear_cross_entropy",)
    ),
    "pipeline 2": Way(2, {"parallel.pipeline": {"size": 2}}),
    "pipeline 2, split": Way(2, {"parallel.pipeline": {"size": 2, "schedule": "zb-h1"}}, ("linear_cross_entropy",)),
    "tensor 2 x stage 3, recomputed": Way(
        4,
        {
            "parallel.zero": {"stage": 3},
            "parallel.tensor": {"size": 2, "sequence_parallel": True},
            "recompute.mode": "full",
        },
        ("linear_cross_entropy",),
    ),
}


def spec_of(model: SmallModel, config: Mapping[str, Any]) -> RunSpec:
    base = {
        "batch": {"global_size": 4, "micro_size": 1},
        "precision": "fp64",
        "optimizer": {"name": "adamw", "lr": 1.0e-3, "max_grad_norm": None, "eps": 1.0e-6},
    }
    twins = "colossal_core.testing.op_twins:twins"
    return RunSpec(base, model, SmallBatches(model), num_steps=2, extra_ops=twins).with_overrides(config)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool() as running:
        yield running


def check(model: SmallModel, way: Way, pool: WorkerPool) -> None:
    spec = spec_of(model, way.config)
    chosen = chosen_in(prepare(spec, way.num_ranks).plan.data)
    wanted = {op: count for op, count in REPLACED[model].items() if op not in way.without}
    assert {op: len(names) for op, names in chosen.items()} == wanted
    truth = pool.run(1, record, oracle_of(spec_of(model, {})))[0]
    found = pool.run(way.num_ranks, record, spec)
    assert max(row.difference for row in compare(found, truth)) <= EXACT


@pytest.mark.parametrize("model", REPLACED, ids=lambda model: model.architecture)
def test_models_are_exact_with_ops(model: SmallModel, pool: WorkerPool) -> None:
    check(model, WAYS["stage 1"], pool)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "stage 1"])
def test_ways_of_spreading_are_exact_with_ops(way: str, pool: WorkerPool) -> None:
    check(LLAMA, WAYS[way], pool)
