"""Plans of real architectures, of adapters, and of a module of one's own: what is cut, and that it is the model's own names."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from colossal_core.anatomy import ModelAnatomy
from colossal_core.examine import examine
from colossal_core.mesh import MeshLayout
from colossal_core.plan import initial_layouts
from colossal_tensor.config import TensorConfig
from colossal_tensor.group import Exit, TensorPlan
from colossal_tensor.layouts import tensor_layouts
from colossal_tensor.search.find import find_plan


def anatomy_of(model_class: str, config_class: str, **sizes: Any) -> ModelAnatomy:
    """The anatomy of a model with the sizes of its default config, on the meta device."""
    with torch.device("meta"):
        return examine(getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)))


def share_cut(plan: TensorPlan, anatomy: ModelAnatomy, size: int) -> float:
    """The part of the parameters in matrices inside blocks that is cut over `size` ranks."""
    mesh = MeshLayout((1, 1, 1, 1, size))
    laid = tensor_layouts(plan, anatomy, initial_layouts(anatomy, mesh), mesh)
    assert laid.problems == ()
    matrices = [fact for fact in anatomy.parameters if fact.block and len(fact.shape) > 1]
    cut = [fact for fact in matrices if laid.layouts[fact.full_name].compute.cut_axes]
    return sum(math.prod(fact.shape) for fact in cut) / sum(math.prod(fact.shape) for fact in matrices)


EVERYTHING = {
    "llama": ("LlamaForCausalLM", "LlamaConfig"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config"),
    "bloom": ("BloomForCausalLM", "BloomConfig"),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig"),
    "bert": ("BertForMaskedLM", "BertConfig"),
    "t5": ("T5ForConditionalGeneration", "T5Config"),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig"),
    "vit": ("ViTForImageClassification", "ViTConfig"),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_matrix_of_a_block_is_cut(name: str) -> None:
    anatomy = anatomy_of(*EVERYTHING[name])
    plan = find_plan(anatomy, TensorConfig(size=2))
    assert share_cut(plan, anatomy, 2) > 0.99
    assert "gathered" not in {plan.source[group.name] for group in plan.groups if ".layer" in group.name}


def test_latent_attention_is_cut_after_its_compression() -> None:
    anatomy = anatomy_of("DeepseekV3ForCausalLM", "DeepseekV3Config", num_hidden_layers=4)
    plan = find_plan(anatomy, TensorConfig(size=2))
    attention = next(group for group in plan.groups if group.name == "model.layers.*.self_attn")
    assert [cut.parameter.split(".")[-2] for cut in attention.cuts] == ["q_b_proj", "kv_b_proj", "o_proj"]
    assert {name.split(".")[-2] for name in plan.partial if "self_attn" in name} == {
        "q_a_proj",
        "q_a_layernorm",
        "kv_a_proj_with_mqa",
        "kv_a_layernorm",
    }


def test_a_norm_over_all_heads_leaves_products_to_be_gathered() -> None:
    anatomy = anatomy_of("Olmo2ForCausalLM", "Olmo2Config")
    plan = find_plan(anatomy, TensorConfig(size=2))
    assert plan.source["model.layers.*.mlp"] == "transformers"
    assert plan.source["model.layers.*.self_attn.q_proj"] == "gathered"
    assert plan.stream is not None
    assert [entry.module for entry in plan.stream.whole] == ["model.layers.*.self_attn"]
    assert plan.notes[0].startswith("model.layers.*.self_attn has no cut from stream to stream: ")


def test_more_ranks_than_key_value_heads_are_proven_with_copies() -> None:
    anatomy = anatomy_of("MistralForCausalLM", "MistralConfig", num_key_value_heads=2)
    plan = find_plan(anatomy, TensorConfig(size=4))
    assert share_cut(plan, anatomy, 4) == 1.0
    shared = [cut.parameter.split(".")[-2] for group in plan.groups for cut in group.cuts if cut.shared]
    assert shared == ["k_proj", "v_proj"]


def test_the_stream_ends_at_the_last_block_of_the_model_itself() -> None:
    anatomy = anatomy_of("GPT2LMHeadModel", "GPT2Config")
    plan = find_plan(anatomy, TensorConfig(size=2))
    assert plan.stream is not None
    assert plan.stream.exits == (Exit("transformer.h.11"),)
    assert find_plan(anatomy, TensorConfig(size=2, sequence_parallel=False)).stream is None


def test_frozen_parameters_are_another_question() -> None:
    anatomy = examine(Own(), {"x": torch.zeros(2, 4, 3)})
    frozen = tuple(replace(fact, trainable=fact.block is None) for fact in anatomy.parameters)
    find_plan(anatomy, TensorConfig(size=2))
    find_plan(replace(anatomy, parameters=frozen), TensorConfig(size=2))
    assert anatomy.specimen is not None
    assert len(anatomy.specimen.answers) == 2


def test_the_same_question_is_answered_once() -> None:
    first = find_plan(anatomy_of("GPT2LMHeadModel", "GPT2Config"), TensorConfig(size=2))
    again = find_plan(anatomy_of("GPT2LMHeadModel", "GPT2Config"), TensorConfig(size=2))
    assert first.groups is again.groups


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_adapters_are_cut_with_the_layers_that_they_adapt() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"])
    anatomy = examine(peft.get_peft_model(transformers.LlamaForCausalLM(config), adapters))
    plan = find_plan(anatomy, TensorConfig(size=2))
    attention = next(group for group in plan.groups if group.name.endswith("self_attn"))
    cut = {".".join(part.parameter.split(".")[6:]): part.dim for part in attention.cuts}
    assert cut == {
        "q_proj.base_layer.weight": 0,
        "q_proj.lora_B.default.weight": 0,
        "k_proj.weight": 0,
        "v_proj.weight": 0,
        "o_proj.base_layer.weight": 1,
        "o_proj.lora_A.default.weight": 1,
    }
    partial = {".".join(name.split(".")[6:]) for name in plan.partial if "lora" in name}
    assert partial == {"q_proj.lora_A.default.weight", "o_proj.lora_B.default.weight"}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())  # type: ignore[no-any-return]


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.layers, self.outlet = (
            nn.Linear(3, 16),
            nn.ModuleList([Layer() for _ in range(5)]),
            nn.Linear(16, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        for layer in self.layers:
            x = layer(x)
        return self.outlet(x)  # type: ignore[no-any-return]


def test_a_module_of_ones_own() -> None:
    anatomy = examine(Own(), {"x": torch.zeros(2, 4, 3)})
    plan = find_plan(anatomy, TensorConfig(size=2))
    assert share_cut(plan, anatomy, 2) == 1.0
    assert plan.stream is not None
    assert ([entry.module for entry in plan.stream.entries], plan.stream.exits) == (["layers.0"], (Exit("layers.4"),))


def test_without_a_small_model_nothing_is_cut() -> None:
    plan = find_plan(examine(Own()), TensorConfig(size=2))
    assert plan == TensorPlan(notes=("no small model of this kind can be made: give model.example_batch",))


class Telling(nn.Module):
    """Gives out its last activations beside its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x), x


def test_outputs_that_a_users_loss_reads_are_whole() -> None:
    anatomy = replace(examine(Telling(), {"tokens": torch.arange(8).reshape(2, 4)}), task="causal-lm")
    ours, own = (find_plan(replace(anatomy, own_loss=own), TensorConfig(size=2)).stream for own in (False, True))
    assert ours is not None
    assert own is not None
    assert ours.exits == ()
    assert own.exits == (Exit("layers.2"),)
