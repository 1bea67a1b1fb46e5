"""Small configs of any architecture: sizes go down, kinds stay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from colossal_core.small_config import MAX_DEPTH, shrink_config
from colossal_core.task import config_facts

transformers = pytest.importorskip("transformers", reason="shrinks configs of transformers")


class Config:
    """A config as `shrink_config` sees one: keys in, keys out."""

    def __init__(self, **keys: Any) -> None:
        self.keys = keys
        self.sub_configs = {name: Config for name, value in keys.items() if isinstance(value, Config)}
        self.__dict__.update(keys)

    def to_dict(self) -> dict[str, Any]:
        return {name: value.to_dict() if isinstance(value, Config) else value for name, value in self.keys.items()}


def keys_of(**keys: Any) -> dict[str, Any]:
    found: Config = shrink_config(Config(**keys))
    return found.keys


def small(architecture: str, **keys: Any) -> Any:
    return shrink_config(transformers.AutoConfig.for_model(architecture, **keys))


def test_one_layer_of_each_kind_is_kept() -> None:
    types, experts = (
        ["near", "near", "far", "near", "near", "far"],
        ["dense", "sparse", "sparse", "sparse", "sparse", "sparse"],
    )
    found = keys_of(num_hidden_layers=6, layer_types=types, mlp_layer_types=experts, pattern=[1, 2])
    expected = {
        "num_hidden_layers": 3,
        "layer_types": ["near", "near", "far"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    }
    assert found == {**expected, "pattern": [1, 2]}
    assert small("qwen3_5_text").layer_types == ["linear_attention", "full_attention"]


def test_there_are_only_so_many_kinds() -> None:
    found = keys_of(n_layer=9, rates=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    assert found == {"n_layer": MAX_DEPTH, "rates": [1.0, 2.0, 3.0, 4.0]}


def test_like_layers_are_two() -> None:
    assert keys_of(num_layers=12, layer_types=["full"] * 12) == {"num_layers": 2, "layer_types": ["full", "full"]}
    assert small("llama").num_hidden_layers == 2
    assert small("gpt2", n_layer=1).n_layer == 1


def test_a_size_given_layer_by_layer_is_shrunk_in_each() -> None:
    found = keys_of(num_hidden_layers=2, intermediate_size=[4096, 32])
    assert found == {"num_hidden_layers": 2, "intermediate_size": [96, 32]}


def test_a_layer_with_sizes_of_its_own_stays_different() -> None:
    own = {"num_attention_heads": 64, "num_key_value_heads": 64, "kv_lora_rank": 1024}
    found = keys_of(
        num_hidden_layers=4,
        num_attention_heads=128,
        num_key_value_heads=128,
        kv_lora_rank=512,
        per_layer_config={"3": own},
    )
    assert (found["num_hidden_layers"], found["num_attention_heads"], found["num_key_value_heads"]) == (2, 4, 4)
    assert found["per_layer_config"] == {1: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 64}}


def test_heads_stay_grouped_or_not() -> None:
    assert keys_of(num_attention_heads=32, num_key_value_heads=32) == {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    assert keys_of(num_attention_heads=32, num_key_value_heads=8) == {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    assert keys_of(num_attention_heads=32, num_key_value_heads=1) == {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    }


def test_parts_are_shrunk_at_any_depth() -> None:
    found = keys_of(hidden_size=4096, part=Config(d_model=512, inner=Config(vocab_size=50_000)))
    assert found == {"hidden_size": 64, "part": {"d_model": 64, "inner": {"vocab_size": 256}}}
    assert small("gemma3").vision_config.hidden_size == 64


def test_overrides_come_last() -> None:
    assert shrink_config(Config(hidden_size=4096), {"hidden_size": 32}).keys == {"hidden_size": 32}


class Varied(SimpleNamespace):
    """As transformers answers where layers have numbers of their own."""

    @property
    def num_attention_heads(self) -> int:
        raise RuntimeError("'num_attention_heads' is a per-layer attribute and may vary across layers")


def test_a_number_that_differs_by_layer_is_no_number() -> None:
    model = nn.Linear(2, 2)
    model.config = Varied(hidden_size=8)  # type: ignore[assignment]
    facts = config_facts(model)
    assert (facts.hidden_size, facts.num_heads) == (8, None)
