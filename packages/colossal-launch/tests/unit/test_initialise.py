"""First values unit by unit: as transformers' own in distribution, the same however the model is cut, and nothing guessed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.config.sections import ModelConfig
from colossal_core.errors import ConfigError
from colossal_launch.models import BuiltModel, InitialWeights, build_model
from colossal_launch.models.meta import parameters_on_meta
from colossal_launch.models.weights import REST, all_values, unit_of

HEADS: dict[str, Any] = {"num_attention_heads": 4}
LLAMA: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 192, **HEADS}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4},
    "opt": {"hidden_size": 128, "num_hidden_layers": 2, "ffn_dim": 192, "word_embed_proj_dim": 128, **HEADS},
    "gemma2": {**LLAMA, "num_key_value_heads": 2, "head_dim": 32},
    "mixtral": {**LLAMA, "num_key_value_heads": 2, "num_local_experts": 4},
    "bert": LLAMA,
    "t5": {"d_model": 128, "num_layers": 2, "num_heads": 4, "d_ff": 192, "d_kv": 32},
}


def _build(architecture: str, seed: int = 1) -> BuiltModel:
    config = ModelConfig(architecture=architecture, config=ARCHITECTURES[architecture])
    return build_model(config, vocab_size=500, seed=seed, eos_id=0)


def _blocks(module: nn.Module) -> list[str]:
    lists = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    outer = [name for name in lists if unit_of(name.rpartition(".")[0], lists) == REST]
    return [f"{name}.{index}" for name in outer for index in range(len(module.get_submodule(name)))]  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_have_transformers_distribution_and_do_not_depend_on_the_cut(architecture: str) -> None:
    pytest.importorskip("transformers")
    built = _build(architecture)
    assert built.weights is not None
    assert all(parameter.is_meta for parameter in built.module.parameters())
    assert not any(buffer.is_meta for buffer in built.module.buffers())
    blocks = _blocks(built.module)
    assert len(blocks) >= 2
    one = dict(built.weights.values(REST, ()))
    many = dict(all_values(built.weights, blocks))
    assert one.keys() == many.keys() == dict(built.module.named_parameters()).keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    again = _build(architecture).weights
    assert again is not None
    assert all(torch.equal(one[name], value) for name, value in again.values(REST, ()))
    torch.manual_seed(0)
    reference = type(built.module)._from_config(copy.deepcopy(built.module.config), dtype=torch.float32)  # type: ignore[attr-defined]
    for name, expected in reference.named_parameters():
        value = one[name]
        assert value.shape == expected.shape
        assert value.dtype == torch.float32
        std = float(expected.detach().std()) if expected.numel() > 1 else 0.0
        # The standard deviation of n normal samples is itself off by 1 / sqrt(2 n); six of those, for both sides.
        assert float(value.std()) == pytest.approx(std, abs=6 * std / expected.numel() ** 0.5), name
        assert float(value.mean()) == pytest.approx(
            float(expected.detach().mean()), abs=9 * std / expected.numel() ** 0.5
        )


def test_filled_model_runs_as_one_built_on_the_cpu() -> None:
    pytest.importorskip("transformers")
    built = _build("llama")
    assert built.weights is not None
    values = dict(built.weights.values(REST, ()))
    module = built.module
    for name in values:
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Parameter(values[name]))
    reference = type(module)(copy.deepcopy(module.config))
    reference.load_state_dict(values)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(module(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_seeds_differ_and_torch_random_numbers_are_left_alone() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (_build("gpt2", seed).weights for seed in (1, 2))
    assert first is not None
    assert second is not None
    a, b = dict(first.values(REST, ())), dict(second.values(REST, ()))
    assert torch.equal(torch.rand(3), expected)
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(a[name], b[name])
    assert not torch.equal(a[name], a["transformer.h.1.attn.c_attn.weight"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.25))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("places", torch.arange(4), persistent=False)


BLOCKS = ("blocks.0", "blocks.1")


def test_plain_modules_use_reset_parameters_and_what_constructors_wrote() -> None:
    with parameters_on_meta() as constructed:
        model = Plain()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.weight is model.embedding.weight
    assert model.get_buffer("places").tolist() == [0, 1, 2, 3]
    source = InitialWeights(model, 0, constructed=constructed.named(model))
    values = dict(all_values(source, BLOCKS))
    assert values.keys() == dict(model.named_parameters()).keys()
    assert values["blocks.1.scale"].tolist() == [0.25] * 8
    assert 0.8 < float(values["embedding.weight"].std()) < 1.2
    assert float(values["blocks.0.linear.weight"].abs().max()) <= 8**-0.5
    assert values["norm.weight"].tolist() == [1.0] * 8
    assert values["attention.in_proj_bias"].tolist() == [0.0] * 24


def test_buffers_lost_on_the_meta_device_are_made_again() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    values = dict(InitialWeights(model, 0).values(REST, ()))
    assert values["1.running_var"].tolist() == [1.0] * 4
    assert int(values["1.num_batches_tracked"]) == 0


def test_values_survive_the_model_being_taken_apart() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    source = InitialWeights(model, 0)
    expected = dict(InitialWeights(model, 0).values(REST, ()))
    model[0].weight = nn.Parameter(torch.zeros(2))
    assert all(torch.equal(value, expected[name]) for name, value in source.values(REST, ()))


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4))


def test_nothing_is_guessed() -> None:
    with torch.device("meta"):
        model = Unknown()
    with pytest.raises(ConfigError) as caught:
        dict(InitialWeights(model, 0).values(REST, ()))
    assert str(caught.value) == (
        "model: first values cannot be made unit by unit: nothing initialises weight: "
        "build the model with real parameters, or give its modules `reset_parameters`"
    )


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def initialize_weights(self) -> None:
        self._init_weights(self)

    def _init_weights(self, module: nn.Module) -> None:
        if module is self or isinstance(module, Outer):
            nn.init.constant_(self.blocks[1].bias, 3.0)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def test_a_model_that_writes_into_its_blocks_is_built_whole() -> None:
    def whole() -> nn.Module:
        model = Outer()
        for block in model.blocks:
            model._init_weights(block)
        model._init_weights(model)
        return model

    with torch.device("meta"):
        model = Outer()
    values = dict(all_values(InitialWeights(model, 0, build_whole=whole), ("blocks.0", "blocks.1")))
    assert values["blocks.1.bias"].tolist() == [3.0] * 4
    assert values["blocks.0.bias"].tolist() == [0.0] * 4
    with pytest.raises(ConfigError, match=r"unit by unit: the model initialises blocks\.1\.bias: build"):
        dict(all_values(InitialWeights(model, 0), ("blocks.0", "blocks.1")))
