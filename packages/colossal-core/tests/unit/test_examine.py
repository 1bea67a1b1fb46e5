"""The anatomy of transformers models: block lists by data flow, for architectures of every kind, from tiny configs on meta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.anatomy import ModelAnatomy
from colossal_core.examine import examine

transformers = pytest.importorskip("transformers", reason="core works without transformers; these are its models")

NAMED = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**NAMED, "num_key_value_heads": 2}
SHORT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

CAUSAL: list[tuple[str, Mapping[str, Any], str, int]] = [
    ("llama", GROUPED, "model.layers", 3),
    ("mistral", GROUPED, "model.layers", 3),
    ("qwen2", GROUPED, "model.layers", 3),
    ("qwen3", GROUPED, "model.layers", 3),
    ("gemma", {**GROUPED, "head_dim": 8}, "model.layers", 3),
    ("gemma2", {**GROUPED, "head_dim": 8}, "model.layers", 3),
    ("phi", NAMED, "model.layers", 3),
    ("olmo2", GROUPED, "model.layers", 3),
    ("stablelm", GROUPED, "model.layers", 3),
    ("mixtral", {**GROUPED, "num_local_experts": 4}, "model.layers", 3),
    ("qwen3_moe", {**GROUPED, **MOE, "num_experts": 4, "head_dim": 8}, "model.layers", 3),
    ("gpt_oss", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, "model.layers", 3),
    (
        "deepseek_v3",
        {**NAMED, **MOE, **MLA, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
        "model.layers",
        3,
    ),
    ("gpt2", SHORT, "transformer.h", 3),
    ("gptj", {**SHORT, "rotary_dim": 4}, "transformer.h", 3),
    ("gpt_neox", NAMED, "gpt_neox.layers", 3),
    (
        "gpt_neo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "transformer.h",
        2,
    ),
    ("opt", {**NAMED, "ffn_dim": 48, "word_embed_proj_dim": 32}, "model.decoder.layers", 3),
    ("bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}, "transformer.h", 3),
    ("falcon", NAMED, "transformer.h", 3),
    ("mpt", {"d_model": 32, "n_layers": 3, "n_heads": 4}, "transformer.blocks", 3),
    ("mamba", {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}, "backbone.layers", 3),
    ("bert", {**NAMED, "is_decoder": True}, "bert.encoder.layer", 3),
]

CODED = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4}
CODED = {**CODED, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
SMALL_IMAGE = {**NAMED, "image_size": 16, "patch_size": 8}

OTHERS: list[tuple[str, str, Mapping[str, Any], dict[str, int], str]] = [
    ("BertForMaskedLM", "BertConfig", {**NAMED, "vocab_size": 64}, {"bert.encoder.layer": 3}, "masked-lm"),
    ("ViTForImageClassification", "ViTConfig", SMALL_IMAGE, {"vit.layers": 3}, "own-loss"),
    (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "vocab_size": 64,
        },
        {"encoder.block": 2, "decoder.block": 3},
        "seq2seq-lm",
    ),
    (
        "BartForConditionalGeneration",
        "BartConfig",
        {**CODED, **SPECIAL},
        {"model.encoder.layers": 2, "model.decoder.layers": 3},
        "seq2seq-lm",
    ),
    (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**CODED, **SPECIAL, "max_source_positions": 30, "num_mel_bins": 16},
        {"model.encoder.layers": 2, "model.decoder.layers": 3},
        "seq2seq-lm",
    ),
    (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**NAMED, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0},
            "vision_config": SMALL_IMAGE,
        },
        {"vision_model.encoder.layers": 3, "text_model.encoder.layers": 3},
        "own-loss",
    ),
]


def causal(kind: str, settings: Mapping[str, Any]) -> nn.Module:
    special = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **{"vocab_size": 64, **special, **settings})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert isinstance(model, nn.Module)
    return model


def lists(anatomy: ModelAnatomy) -> dict[str, int]:
    return {chain.names[0].rpartition(".")[0]: len(chain.names) for chain in anatomy.chains}


@pytest.mark.parametrize(("kind", "settings", "where", "num_layers"), CAUSAL, ids=[row[0] for row in CAUSAL])
def test_causal_models_have_one_chain_of_all_layers(
    kind: str, settings: Mapping[str, Any], where: str, num_layers: int
) -> None:
    model = causal(kind, settings)
    anatomy = examine(model)
    assert anatomy.untraced == ""
    assert [chain.names for chain in anatomy.chains] == [tuple(f"{where}.{index}" for index in range(num_layers))]
    assert [chain.found_by for chain in anatomy.chains] == ["data flow"]
    assert anatomy.task == "causal-lm"
    assert anatomy.vocab_size == 64
    assert anatomy.hidden_size == 32
    assert len(anatomy.embeddings) == len(anatomy.heads) == 1
    assert anatomy.forward_keys is not None
    assert {"input_ids", "labels"} <= set(anatomy.forward_keys)
    assert anatomy == examine(model)


@pytest.mark.parametrize(("name", "config", "settings", "expected", "task"), OTHERS, ids=[row[0] for row in OTHERS])
def test_other_models_have_their_chains(
    name: str, config: str, settings: Mapping[str, Any], expected: dict[str, int], task: str
) -> None:
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    anatomy = examine(model)
    assert lists(anatomy) == expected
    assert {chain.found_by for chain in anatomy.chains} == {"data flow"}
    assert anatomy.task == task
    assert anatomy.untraced == ""


def test_a_vision_tower_that_a_text_pass_does_not_reach_is_found_by_structure() -> None:
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 64, **GROUPED},
        vision_config={"model_type": "clip_vision_model", **SMALL_IMAGE},
    )
    with torch.device("meta"):
        anatomy = examine(transformers.LlavaForConditionalGeneration(config))
    found = {chain.names[0]: chain.found_by for chain in anatomy.chains}
    assert found == {"model.language_model.layers.0": "data flow", "model.vision_tower.encoder.layers.0": "structure"}


def test_one_layer_is_a_chain() -> None:
    anatomy = examine(causal("llama", {**GROUPED, "num_hidden_layers": 1}))
    assert anatomy.blocks == ("model.layers.0",)


def test_a_group_that_runs_three_times_is_one_repeated_block() -> None:
    with torch.device("meta"):
        model = transformers.AlbertForMaskedLM(transformers.AlbertConfig(**NAMED, vocab_size=64, embedding_size=16))
    anatomy = examine(model)
    assert len(anatomy.chains) == 1
    assert anatomy.chains[0].names == anatomy.chains[0].repeated == ("albert.encoder.albert_layer_groups.0",)


def test_facts_of_a_mixture_of_experts() -> None:
    anatomy = examine(causal("mixtral", {**GROUPED, "num_local_experts": 4, "output_router_logits": True}))
    assert anatomy.auxiliary_loss
    assert anatomy.untraced == ""
    assert anatomy.attention == tuple(f"model.layers.{index}.self_attn" for index in range(3))
    assert anatomy.experts == tuple(f"model.layers.{index}.mlp.experts" for index in range(3))
    assert (anatomy.num_heads, anatomy.num_key_value_heads) == (4, 2)
    assert ("lm_head", "column_gathered") in anatomy.tensor_plan
    assert ("model.layers.*.mlp.experts.gate_up_proj", "expert_dimension") in anatomy.expert_plan
    blocks = {fact.full_name: fact.block for fact in anatomy.parameters}
    assert blocks["model.embed_tokens.weight"] == ""
    assert blocks["model.layers.2.mlp.experts.down_proj"] == "model.layers.2"


def test_fused_dropout_is_what_the_kernel_is_asked_for() -> None:
    assert examine(causal("gpt2", SHORT)).fused_dropout == tuple(f"transformer.h.{index}.attn" for index in range(3))
    assert examine(causal("gpt2", {**SHORT, "attn_pdrop": 0.0})).fused_dropout == ()
    assert examine(causal("gpt2", {**SHORT, "attn_implementation": "eager"})).fused_dropout == ()


def test_a_real_model_is_neither_moved_nor_called_nor_changed() -> None:
    config = transformers.GPT2Config(**SHORT, vocab_size=64, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).train()
    calls: list[object] = []
    model.transformer.h[0].register_forward_hook(lambda *args: calls.append(args))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    anatomy = examine(model)
    assert anatomy.tied == (("transformer.wte.weight", "lm_head.weight"),)
    assert not calls
    assert model.training
    assert model.transformer.h[0].training
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
