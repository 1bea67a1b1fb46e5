"""The section `parallel.tensor`: its defaults, what it refuses, and that asking for it costs nothing before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import colossal_tensor
from colossal_core.config import ConfigSpec, build_config_class, parse_config
from colossal_core.errors import ConfigError
from colossal_core.plugins import discover
from colossal_tensor.config import TensorConfig


def parsed(section: dict[str, object]) -> TensorConfig:
    config_class = build_config_class([ConfigSpec("parallel.tensor", TensorConfig)])
    config = parse_config({"batch": {"global_size": 4}, "parallel": {"tensor": section}}, config_class)
    found = config.section("parallel.tensor")
    assert isinstance(found, TensorConfig)
    return found


def test_defaults() -> None:
    assert parsed({}) == TensorConfig(size=1, mode="1d", sequence_parallel=None, rules={})


def test_overlap_without_symmetric_memory_can_be_asked_for() -> None:
    assert parsed({}).overlap == "auto"
    assert parsed({"overlap": "plain"}).overlap == "plain"


def test_rules_are_names_and_styles() -> None:
    rules = {"blocks.*.up": "column", "blocks.*.down": "row", "blocks.*.qkv": "packed3", "router": "replicate"}
    assert parsed({"size": 2, "rules": rules}).rules == rules


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"size": 0}, "size"),
        ({"size": "2"}, "size"),
        ({"mode": "4d"}, "mode"),
        ({"sequence_parallel": "yes"}, "sequence_parallel"),
        ({"sizes": 2}, "sizes"),
        ({"rules": {"blocks.*.up": "diagonal"}}, "rules.blocks.*.up"),
    ],
)
def test_impossible_values_name_the_field(section: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parsed(section)
    assert [problem.field for problem in raised.value.problems] == [f"parallel.tensor.{field}"]


def test_the_plugin_is_found_and_active_from_two_ranks_on() -> None:
    plugins = discover(allow="comm,tensor")
    config_class = plugins.config_class()
    for size, names in ((1, []), (2, ["tensor"])):
        config = parse_config({"batch": {"global_size": 4}, "parallel": {"tensor": {"size": size}}}, config_class)
        assert [strategy.name for strategy in plugins.active(config) if strategy.name == "tensor"] == names
        assert plugins.axis_sizes(config) == {"tp": size}


def test_what_the_package_exports() -> None:
    assert colossal_tensor.TensorConfig is TensorConfig
    with pytest.raises(AttributeError, match=r"^module 'colossal_tensor' has no attribute 'Tensor'$"):
        _ = colossal_tensor.Tensor


def test_the_plugin_is_light_until_it_is_asked() -> None:
    code = "import sys, colossal_tensor.plugin; print(sorted({'torch', 'pydantic', 'transformers'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "[]\n"
