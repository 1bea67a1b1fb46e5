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
    assert parsed({}) == ZeroConfig(stage=0, replicate=1, bucket_bytes=64 * 2**20)


@pytest.mark.parametrize(
    "section", [{"stage": 4}, {"stage": "1"}, {"replicate": 0}, {"bucket_bytes": 0}, {"stages": 1}]
)
def test_impossible_values_name_the_field(section: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as raised:
        parsed(section)
    assert [problem.field for problem in raised.value.problems] == [f"parallel.zero.{next(iter(section))}"]


@pytest.mark.parametrize("stage", [2, 3])
def test_later_stages_are_refused_by_name(stage: int) -> None:
    config = {"batch": {"global_size": 4}, "parallel": {"zero": {"stage": stage}}}
    with pytest.raises(ConfigError) as raised:
        prepare(RunSpec(config, TinyModel(), TokenBatches()), 2)
    assert str(raised.value) == (
        f"parallel.zero.stage={stage}: stages 2 and 3 are not part of this release of colossal-zero: use 0 or 1"
    )
