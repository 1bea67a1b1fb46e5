"""The section `parallel.zero`: what it refuses, and how it says so."""

from __future__ import annotations

import pytest

from colossal_core.config import ConfigSpec, build_config_class, parse_config
from colossal_core.errors import ConfigError
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TinyModel, TokenBatches
from colossal_core.testing.parity import prepare
from colossal_zero.config import ZeroConfig


def parsed(section: dict[str, object]) -> ZeroConfig:
    config_class = build_config_class([ConfigSpec("parallel.zero", ZeroConfig)])
    found = parse_config({"batch": {"global_size": 4}, "parallel": {"zero": section}}, config_class).section(
        "parallel.zero"
    )
    assert isinstance(found, ZeroConfig)
    return found


def test_defaults() -> None:
    assert parsed({}) == ZeroConfig(
        stage=0,
        replicate=1,
        bucket_bytes=None,
        reduce_dtype=None,
        keep_parameters=None,
        keep_gradients=None,
        prefetch=None,
    )


@pytest.mark.parametrize(
    "section",
    [
        {"stage": 4},
        {"stage": "1"},
        {"replicate": 0},
        {"bucket_bytes": 0},
        {"stages": 1},
        {"prefetch": -1},
        {"keep_parameters": "always"},
        {"keep_gradients": "use"},
        {"reduce_dtype": "fp16"},
    ],
)
def test_impossible_values_name_the_field(section: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as raised:
        parsed(section)
    assert [problem.field for problem in raised.value.problems] == [f"parallel.zero.{next(iter(section))}"]


def refusal(section: dict[str, object], precision: str = "bf16") -> str:
    config = {"batch": {"global_size": 4}, "precision": precision, "parallel": {"zero": section}}
    with pytest.raises(ConfigError) as raised:
        prepare(RunSpec(config, TinyModel(), TokenBatches()), 2)
    return str(raised.value)


@pytest.mark.parametrize("stage", [0, 1])
def test_when_gradients_are_reduced_is_asked_under_stages_2_and_3_only(stage: int) -> None:
    assert refusal({"stage": stage, "keep_gradients": "step"}) == (
        f"parallel.zero.keep_gradients='step': says when gradients are reduced, and stage {stage} adds them up whole in any case: "
        "remove it, or use stage: 2 or 3"
    )


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_how_parameters_are_gathered_is_asked_under_stage_3_only(stage: int) -> None:
    assert refusal({"stage": stage, "keep_parameters": "use", "prefetch": 0}).splitlines() == [
        f"parallel.zero.keep_parameters='use': says how parameters are gathered, and stage {stage} keeps them whole: "
        "remove it, or use stage: 3",
        f"parallel.zero.prefetch=0: says how parameters are gathered, and stage {stage} keeps them whole: "
        "remove it, or use stage: 3",
    ]


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_not_rounded_where_precision_was_asked_for(stage: int, precision: str) -> None:
    assert refusal({"stage": stage, "reduce_dtype": "bf16"}, precision) == (
        f"parallel.zero.reduce_dtype='bf16': would round the gradients of a run in {precision}: remove it, or use precision: bf16"
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_every_stage_has_a_plan(stage: int, precision: str) -> None:
    config = {"batch": {"global_size": 4}, "precision": precision, "parallel": {"zero": {"stage": stage}}}
    plan = prepare(RunSpec(config, TinyModel(), TokenBatches()), 2).plan
    assert any(note.startswith(f"zero: stage {stage}, ") for note in plan.notes)
