"""The user's table: what it says of a model's weights, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import transformers

from colossal_core.errors import ConfigError
from colossal_core.examine import examine
from colossal_tensor.config import TensorConfig
from colossal_tensor.group import TensorPlan, Vocabulary
from colossal_tensor.search.find import find_plan
from colossal_tensor.search.rules import Rule, module_of, name_styles, plan_styles, read_rules

WEIGHTS = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.1.mlp.down_proj.base_layer.weight",
]


def plan_with(**rules: str) -> TensorPlan:
    """The plan for a small Llama, with rules by name relative to a layer."""
    return plan_of({f"model.layers.*.{module.replace('__', '.')}": style for module, style in rules.items()})


def plan_of(rules: Mapping[str, str], *, tied: bool = False) -> TensorPlan:
    config = transformers.LlamaConfig(num_hidden_layers=3, num_key_value_heads=8, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    if tied:
        model.tie_weights()
    return find_plan(examine(model), TensorConfig.model_validate({"size": 2, "rules": rules}))


def test_a_rule_names_modules_and_later_rules_win() -> None:
    read, problems = read_rules(
        [Rule("model.layers.*.self_attn", "replicate"), Rule("model.layers.*.self_attn.q_proj", "packed2")], WEIGHTS
    )
    assert problems == []
    assert read.styles == {"model.layers.0.self_attn.q_proj.weight": "column"}
    assert read.packings == {"model.layers.0.self_attn.q_proj.weight": "two"}
    assert read.whole == {"model.layers.0.self_attn.o_proj.weight"}


def test_a_rule_for_one_block_is_told_to_hold_for_all() -> None:
    _, problems = read_rules([Rule("model.layers.17.self_attn.q_proj", "column")], WEIGHTS)
    assert [str(problem) for problem in problems] == [
        "parallel.tensor.rules='model.layers.17.self_attn.q_proj: column': names one block; a rule holds for all blocks of a kind: use "
        "`*`: `model.layers.*.self_attn.q_proj`"
    ]


def test_a_rule_that_matches_nothing_is_named_with_the_nearest_module() -> None:
    _, problems = read_rules([Rule("model.layers.*.self_attn.k_prj", "column")], WEIGHTS)
    assert [str(problem) for problem in problems] == [
        "parallel.tensor.rules='model.layers.*.self_attn.k_prj: column': `model.layers.*.self_attn.k_prj` matches no module with a weight: "
        "did you mean `model.layers.*.self_attn.q_proj`? Name a module with a weight, relative to the model"
    ]


def test_a_table_has_ten_lines_at_most() -> None:
    rules = [Rule("model.layers.*.self_attn.q_proj", "column")] * 11
    _, problems = read_rules(rules, WEIGHTS)
    assert [problem.reason for problem in problems] == ["has 11 lines; a model takes 10 at most"]


def test_modules_are_named_as_a_user_sees_them() -> None:
    assert [module_of(weight).rpartition(".")[2] for weight in WEIGHTS] == [
        "q_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    ]


def test_a_plan_of_transformers_is_read_by_module_and_by_tensor() -> None:
    plan = (
        ("model.layers.*.self_attn.q_proj", "column"),
        ("model.layers.*.mlp.experts.gate_up_proj", "packed_column"),
        ("model.layers.*.mlp.down_proj", "row"),
        ("model.layers.*.self_attn.o_proj", "unknown:new"),
    )
    assert plan_styles(plan, WEIGHTS) == {WEIGHTS[0]: "column", WEIGHTS[2]: "column", WEIGHTS[3]: "row"}


def test_usual_names_of_rows() -> None:
    assert list(name_styles(WEIGHTS).values()) == ["column", "row", "column", "row"]


def test_without_rules_everything_is_cut() -> None:
    plan = plan_with()
    assert [group.name for group in plan.groups] == ["model.layers.*.self_attn", "model.layers.*.mlp"]
    assert plan.source == {"model.layers.*.self_attn": "transformers", "model.layers.*.mlp": "transformers"}
    assert plan.notes == ()


def test_a_replicated_module_stays_whole() -> None:
    plan = plan_with(self_attn="replicate")
    assert [group.name for group in plan.groups] == ["model.layers.*.mlp"]


@pytest.mark.parametrize(
    ("module", "tied", "cut"),
    [
        ("lm_head", False, Vocabulary("model.embed_tokens", "")),
        ("model.embed_tokens", False, Vocabulary("", "lm_head")),
        ("lm_head", True, Vocabulary()),
    ],
)
def test_a_replicated_end_of_the_vocabulary_stays_whole(module: str, tied: bool, cut: Vocabulary) -> None:
    assert plan_of({module: "replicate"}, tied=tied).vocabulary == cut


def test_a_head_takes_no_other_style() -> None:
    with pytest.raises(ConfigError) as error:
        plan_of({"lm_head": "column"})
    assert [str(problem) for problem in error.value.problems] == [
        "parallel.tensor.rules='lm_head: column': an embedding or a head is cut by words, or not at all: use `replicate`, or leave the "
        "rule out"
    ]


def test_a_rule_that_agrees_is_the_source() -> None:
    plan = plan_with(mlp__gate_proj="column", mlp__up_proj="column", mlp__down_proj="row")
    assert plan.source["model.layers.*.mlp"] == "rules"


def test_a_module_left_half_sharded_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError) as error:
        plan_with(self_attn__k_proj="replicate")
    assert [str(problem) for problem in error.value.problems] == [
        "parallel.tensor.rules='model.layers.*.self_attn.k_proj: replicate': leaves model.layers.*.self_attn.k_proj half sharded: it "
        "belongs together with model.layers.*.self_attn.o_proj, model.layers.*.self_attn.q_proj, model.layers.*.self_attn.v_proj: "
        "give rules for all of them, or leave this one out"
    ]


def test_a_row_without_columns_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError) as error:
        plan_with(mlp__gate_proj="row")
    assert "leaves model.layers.*.mlp.gate_proj half sharded" in str(error.value)


def test_a_rule_that_is_not_exact_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError) as error:
        plan_with(self_attn__q_proj="packed2")
    assert "cutting model.layers.*.self_attn.q_proj so is not the same as one process" in str(error.value)
