"""The closed forms of every stage, number by number, on a model that is easy to count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from colossal_core.estimate import EstimateTable, HardwareProfile, ModelSize
from colossal_zero.config import ZeroConfig
from colossal_zero.cost import estimate_zero

TRAINED, FROZEN, BLOCK, RANKS, MICROBATCHES = 1000, 200, 200, 4, 3
MODEL = ModelSize(
    num_parameters=TRAINED + FROZEN,
    num_trainable=TRAINED,
    num_blocks=4,
    block_parameters=BLOCK,
    hidden_size=0,
    sequence_length=0,
    vocab_size=0,
    num_heads=0,
    largest_parameter=100,
)
OUTSIDE = TRAINED + FROZEN - 4 * BLOCK
EARLY = OUTSIDE + BLOCK
MIXED = HardwareProfile("any", 1.0, 1.0, 1.0, 1.0, 0.0)
SAME = HardwareProfile("any", 1.0, 1.0, 1.0, 1.0, 0.0, compute_element_bytes=4)
PURE = HardwareProfile(
    "any", 1.0, 1.0, 1.0, 1.0, 0.0, compute_element_bytes=2, master_element_bytes=2, gradient_element_bytes=4
)


def estimated(
    profile: HardwareProfile, section: dict[str, Any], inputs: dict[str, float] | None = None
) -> EstimateTable:
    sizes = {"pp": 1.0, "dp_replicate": 1.0, "dp_shard": RANKS, "cp": 1.0, "tp": 1.0}
    columns = {**sizes, "micro_size": 1.0, "num_microbatches": MICROBATCHES, **(inputs or {})}
    table = EstimateTable(MODEL, {name: np.array([float(value)]) for name, value in columns.items()})
    return estimate_zero(table, profile, ZeroConfig.model_validate(section))


def columns_of(table: EstimateTable, *names: str) -> tuple[float, ...]:
    return tuple(float(table.column(name)[0]) for name in names)


STATE = ("parameter_bytes", "master_bytes", "gradient_bytes", "optimizer_bytes")


@pytest.mark.parametrize(
    ("stage", "profile", "expected"),
    [
        (0, MIXED, (2400, 4000, 4000, 8000)),
        (1, MIXED, (2400, 1000, 4000, 2000)),
        (2, MIXED, (2400, 1000, 1000, 2000)),
        (3, MIXED, (100 + 2 * EARLY, 1000, 1000, 2000)),
        (0, SAME, (4800, 0, 4000, 8000)),
        (1, SAME, (4800, 0, 4000, 2000)),
        (2, SAME, (4800, 0, 1000, 2000)),
        (3, SAME, (200 + 4 * EARLY, 1000, 1000, 2000)),
        (1, PURE, (2400, 0, 4000, 1000)),
        (3, PURE, (100 + 2 * EARLY, 500, 1000, 1000)),
    ],
)
def test_state(stage: int, profile: HardwareProfile, expected: tuple[float, ...]) -> None:
    assert columns_of(estimated(profile, {"stage": stage}), *STATE) == expected


SHARE = (RANKS - 1) / RANKS


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"stage": 0}, 2 * 4 * TRAINED),
        ({"stage": 1}, (4 + 2) * TRAINED),
        ({"stage": 1, "reduce_dtype": "bf16"}, (2 + 2) * TRAINED),
        ({"stage": 2}, (4 * MICROBATCHES + 2) * TRAINED),
        ({"stage": 2, "reduce_dtype": "bf16"}, (2 * MICROBATCHES + 2) * TRAINED),
        ({"stage": 3}, MICROBATCHES * (4 * TRAINED + 2 * (1200 + 4 * BLOCK))),
        ({"stage": 3, "keep_parameters": "microbatch"}, MICROBATCHES * (4 * TRAINED + 2 * 1200)),
        ({"stage": 3, "keep_parameters": "step"}, MICROBATCHES * 4 * TRAINED + 2 * 1200),
        ({"stage": 2, "keep_gradients": "step"}, (4 + 2) * TRAINED),
        ({"stage": 3, "keep_parameters": "step", "keep_gradients": "step"}, 4 * TRAINED + 2 * 1200),
    ],
)
def test_bytes_sent(section: dict[str, Any], expected: float) -> None:
    assert columns_of(estimated(MIXED, section), "bytes_shard") == (SHARE * expected,)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"stage": 0}, (0, 2 * TRAINED)),
        ({"stage": 1, "reduce_dtype": "bf16"}, (0, (2 + 2) * TRAINED)),
        ({"stage": 2, "bucket_bytes": 400}, (0, 2 * 4 * 1.25 * BLOCK)),
        ({"stage": 2, "bucket_bytes": 400, "reduce_dtype": "bf16"}, (0, 2 * 2 * 1.25 * BLOCK)),
        ({"stage": 3, "bucket_bytes": 400}, (2 * BLOCK, 2 * 4 * 1.25 * BLOCK)),
        ({"stage": 3, "bucket_bytes": 400, "prefetch": 2}, (2 * 2 * BLOCK, 2 * 4 * 1.25 * BLOCK)),
        ({"stage": 3, "bucket_bytes": 400, "keep_parameters": "step"}, (2 * (1200 - EARLY), 2 * 4 * 1.25 * BLOCK)),
    ],
)
def test_buffers(section: dict[str, Any], expected: tuple[float, float]) -> None:
    assert columns_of(estimated(MIXED, section), "gathered_bytes", "transient_bytes") == expected


def test_copies_sum_their_shards_once() -> None:
    found = estimated(MIXED, {"stage": 2}, {"dp_replicate": 2.0})
    assert columns_of(found, "bytes_dp_replicate") == (2 * 0.5 * 4 * TRAINED / RANKS,)


def test_columns_of_the_table_go_before_the_config() -> None:
    inputs = {"zero_stage": 3.0, "keep_parameters": 2.0, "reduce_element_bytes": 2.0, "prefetch": 0.0}
    found = estimated(MIXED, {"stage": 0}, {**inputs, "keep_gradients": 2.0, "bucket_bytes": 400.0})
    asked = {"stage": 3, "keep_parameters": "step", "keep_gradients": "step", "reduce_dtype": "bf16", "prefetch": 0}
    same = estimated(MIXED, {**asked, "bucket_bytes": 400})
    assert {name: column.tolist() for name, column in found.columns.items()} == {
        name: column.tolist() for name, column in same.columns.items()
    }


def test_one_rank_sends_nothing() -> None:
    for stage in range(4):
        found = estimated(MIXED, {"stage": stage}, {"dp_shard": 1.0})
        assert columns_of(found, "bytes_shard", "bytes_dp_replicate") == (0, 0)


def test_in_a_pipeline_parameters_are_gathered_once_a_step_and_gradients_reduced_once_unless_told_otherwise() -> None:
    names = ("gathered_bytes", "gradient_bytes", "bytes_shard")
    asked = {"stage": 3, "keep_parameters": "step", "keep_gradients": "step"}
    alone, staged = estimated(MIXED, {"stage": 3}), estimated(MIXED, {"stage": 3}, {"pp": 2.0})
    assert columns_of(staged, *names) == columns_of(estimated(MIXED, asked, {"pp": 2.0}), *names)
    assert columns_of(alone, *names) != columns_of(estimated(MIXED, asked), *names)
