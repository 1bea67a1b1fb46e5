"""Models by architecture, factory and config: the class that is chosen, and every mistake named with its key."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from colossal_core.config.sections import ModelConfig
from colossal_core.errors import ConfigError
from colossal_launch.models import build_model, shrink_config
from colossal_launch.models.architecture import make_config, training_class
from colossal_launch.models.building import build_from_config
from colossal_launch.models.weights import REST

pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        ("llama", {}, "LlamaForCausalLM"),
        ("bert", {}, "BertForMaskedLM"),
        ("bert", {"is_decoder": True}, "BertLMHeadModel"),
        ("t5", {}, "T5ForConditionalGeneration"),
        ("bart", {}, "BartForConditionalGeneration"),
        ("vit", {}, "ViTForImageClassification"),
    ],
)
def test_the_class_that_trains_an_architecture(architecture: str, keys: dict[str, Any], expected: str) -> None:
    config = make_config(architecture, keys, vocab_size=None, eos_id=None)
    assert training_class(config).__name__ == expected


def test_the_tokenizer_fills_in_what_the_user_leaves_out() -> None:
    config = make_config("opt", {}, vocab_size=300, eos_id=7)
    assert (config.vocab_size, config.eos_token_id, config.bos_token_id, config.pad_token_id) == (300, 7, 7, None)
    config = make_config("opt", {"vocab_size": 512, "eos_token_id": 2}, vocab_size=300, eos_id=7)
    assert (config.vocab_size, config.eos_token_id) == (512, 2)
    built = build_model(ModelConfig(architecture="llama", config=SMALL), vocab_size=300, seed=0)
    assert built.config.use_cache
    assert not built.module.config.use_cache  # type: ignore[union-attr]
    assert built.description == "LlamaForCausalLM with random weights"
    assert built.num_parameters == sum(p.numel() for p in built.module.parameters()) > 0


def _message(config: ModelConfig, vocab_size: int | None = 300) -> str:
    with pytest.raises(ConfigError) as caught:
        build_model(config, vocab_size=vocab_size, seed=0)
    return str(caught.value)


def test_unknown_architecture_and_keys() -> None:
    message = _message(ModelConfig(architecture="lama"))
    assert message.startswith("model.architecture='lama': the installed transformers has no such architecture (it has ")
    assert "did you mean llama" in message
    message = _message(ModelConfig(architecture="llama", config={"num_layer": 2, "hidden_dim": 8}))
    first, second = message.splitlines()
    assert first.startswith("model.config.num_layer=2: unknown key: did you mean num_hidden_layers? llama takes ")
    assert "rope_theta" in first
    assert second.startswith("model.config.hidden_dim=8: unknown key: did you mean hidden_size? llama takes ")
    make_config("llama", {"rope_theta": 5000.0}, vocab_size=None, eos_id=None)
    make_config("gpt2", {"hidden_size": 64, "num_attention_heads": 4}, vocab_size=None, eos_id=None)


def test_wrong_types_and_sizes() -> None:
    assert _message(ModelConfig(architecture="llama", config={"hidden_size": "64"})) == (
        "model.config.hidden_size='64': Validation error for field 'hidden_size': "
        "Field 'hidden_size' expected int, got str (value: '64'): give a value of the type that is named"
    )
    assert _message(ModelConfig(architecture="gpt2", config={"n_embd": 66, "n_head": 4})) == (
        "model.config.n_embd=66: 4 attention heads do not divide it: use a multiple of 4"
    )
    assert "is not a multiple of the number of attention heads (4)" in _message(
        ModelConfig(architecture="llama", config={**SMALL, "hidden_size": 66})
    )
    assert _message(ModelConfig(architecture="llama", config={**SMALL, "num_key_value_heads": 3})) == (
        "model.config.num_key_value_heads=3: it does not divide the 4 attention heads: use a divisor of 4"
    )
    assert _message(ModelConfig(architecture="llama", config={**SMALL, "vocab_size": 299})) == (
        "model.config.vocab_size=299: the tokenizer has 300 entries: leave it out, or use at least as many"
    )


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert _message(ModelConfig(architecture="llama")) == (
        "model.architecture='llama': needs the package transformers, which is not installed: "
        "pip install 'colossal-launch[hf]', or name a model of your own by model.factory"
    )


FACTORIES = """
import torch
def build(width=4, device=None):
    return torch.nn.Linear(width, width, device=device)
def number():
    return 3
"""


def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models_for_test.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    real = build_model(ModelConfig(factory="own_models_for_test:build", config={"width": 3}), vocab_size=None, seed=1)
    assert real.weights is None
    again = build_model(ModelConfig(factory="own_models_for_test:build", config={"width": 3}), vocab_size=None, seed=1)
    assert torch.equal(real.module.get_parameter("weight"), again.module.get_parameter("weight"))
    meta = ModelConfig(factory="own_models_for_test:build", config={"device": "meta"})
    weights = build_model(meta, vocab_size=None, seed=1).weights
    assert weights is not None
    assert [name for name, _ in weights.values(REST, ())] == ["weight", "bias"]
    remedy = "give package.module:function, importable where the command runs"
    assert _message(ModelConfig(factory="own_models_for_test")) == (
        f"model.factory='own_models_for_test': not of the form package.module:function: {remedy}"
    )
    assert _message(ModelConfig(factory="no_such_module:build")) == (
        f"model.factory='no_such_module:build': cannot import no_such_module (No module named 'no_such_module'): {remedy}"
    )
    assert _message(ModelConfig(factory="own_models_for_test:make")) == (
        f"model.factory='own_models_for_test:make': own_models_for_test has no function make: {remedy}"
    )
    assert _message(ModelConfig(factory="own_models_for_test:number")) == (
        "model.factory='own_models_for_test:number': returned int, not a torch.nn.Module: return the module"
    )
    assert _message(ModelConfig(factory="own_models_for_test:build", config={"depth": 3})) == (
        "model.config={'depth': 3}: the factory does not take model.config "
        "(build() got an unexpected keyword argument 'depth'): give the arguments of own_models_for_test:build"
    )


@pytest.mark.parametrize(
    "architecture",
    ["llama", "gpt2", "opt", "gemma2", "gemma3_text", "qwen2", "qwen3", "mixtral", "qwen3_moe", "deepseek_v3", "phi3", "bert",
     "t5", "bart", "falcon", "bloom", "gpt_neox", "olmo2", "mamba", "vit"],
)  # fmt: skip
def test_shrunk_models_are_small_and_run(architecture: str) -> None:
    config = make_config(architecture, {}, vocab_size=None, eos_id=None)
    small = shrink_config(config)
    assert type(small) is type(config)
    built = build_from_config(small, seed=0)
    assert built.num_parameters < 1_000_000
    assert built.weights is not None
    values = dict(built.weights.values(REST, ()))
    module = built.module
    aliases = {id(p): torch.nn.Parameter(values[name]) for name, p in module.named_parameters()}
    for part in list(module.modules()):
        for leaf, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(part, leaf, aliases[id(parameter)])
    module.eval()
    ids = torch.arange(16).view(2, 8)
    inputs = {"pixel_values": torch.zeros(1, 3, 32, 32)} if architecture == "vit" else {"input_ids": ids, "labels": ids}
    logits = module(**inputs).logits
    assert bool(torch.isfinite(logits).all())
    assert logits.shape[-1] == (2 if architecture == "vit" else 256)


def test_shrinking_keeps_the_kind_and_takes_overrides() -> None:
    config = make_config("gemma2", {}, vocab_size=None, eos_id=None)
    small = shrink_config(config, {"intermediate_size": 80})
    assert (small.hidden_size, small.num_hidden_layers, small.intermediate_size) == (64, 2, 80)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small.final_logit_softcapping == config.final_logit_softcapping
    assert config.hidden_size == 2304


@pytest.mark.parametrize("architecture", ["seed_oss", "glm4_moe", "glm4_moe_lite", "reformer"])
def test_a_default_config_is_not_the_users_mistake(architecture: str) -> None:
    """Heads with a width of their own need not divide the hidden size."""
    config = make_config(architecture, {}, vocab_size=None, eos_id=None)
    assert config.hidden_size % config.num_attention_heads
