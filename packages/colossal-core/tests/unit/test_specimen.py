"""Small models of the same kind: by their config, and by their own blocks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.examine import examine
from colossal_core.module_specimen import KEPT_BLOCKS
from colossal_core.specimen import Specimen, SpecimenError, pattern_of, patterns_of

transformers = pytest.importorskip(
    "transformers", reason="core works without transformers; most of these are its models"
)

BIG = {"vocab_size": 32_000, "num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 16}
CASES: list[tuple[str, str, Mapping[str, Any], dict[str, tuple[int, ...]]]] = [
    ("LlamaForCausalLM", "LlamaConfig", {**BIG, "num_key_value_heads": 4}, {"input_ids": (2, 24), "labels": (2, 24)}),
    ("GPT2LMHeadModel", "GPT2Config", {"attn_pdrop": 0.2}, {"input_ids": (2, 24), "labels": (2, 24)}),
    ("T5ForConditionalGeneration", "T5Config", {}, {"input_ids": (2, 24), "labels": (2, 24)}),
    ("BertForMaskedLM", "BertConfig", {}, {"input_ids": (2, 24), "labels": (2, 24)}),
    ("BertForSequenceClassification", "BertConfig", {"num_labels": 3}, {"input_ids": (2, 24), "labels": (2,)}),
    ("ViTForImageClassification", "ViTConfig", {}, {"pixel_values": (2, 3, 32, 32), "labels": (2,)}),
    ("OPTForCausalLM", "OPTConfig", {"word_embed_proj_dim": 512}, {"input_ids": (2, 24), "labels": (2, 24)}),
]


def on_meta(name: str, config: str, settings: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**settings))
    return model


def specimen_of(model: nn.Module, batch: Mapping[str, torch.Tensor] | None = None) -> Specimen:
    found = examine(model, batch).specimen
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "config", "settings", "shapes"), CASES, ids=[case[0] for case in CASES])
def test_a_transformers_model_is_shrunk(
    name: str, config: str, settings: Mapping[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    model = on_meta(name, config, settings)
    before = torch.get_rng_state()
    specimen = specimen_of(model)
    small, batch = specimen.build(), specimen.batch()
    assert torch.equal(before, torch.get_rng_state())
    assert {key: tuple(value.shape) for key, value in batch.items()} == shapes
    assert sum(parameter.numel() for parameter in small.parameters()) < 300_000
    assert type(small) is type(model)
    assert small.training
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}
    assert patterns_of(dict(small.named_parameters())) == patterns_of(dict(model.named_parameters()))
    assert bool(torch.isfinite(small(**batch).loss))
    twin = specimen.build()
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), twin.parameters(), strict=True))


def test_a_model_whose_loss_does_not_run_gets_no_labels() -> None:
    """GIT's reads the logits behind a picture."""
    batch = specimen_of(on_meta("GitForCausalLM", "GitConfig", {})).batch()
    assert {key: tuple(value.shape) for key, value in batch.items()} == {"input_ids": (2, 24)}


def test_the_key_tells_structures_apart() -> None:
    def key(**settings: Any) -> str:
        return specimen_of(on_meta("LlamaForCausalLM", "LlamaConfig", {**BIG, **settings})).key

    assert key() == key()
    assert key() == key(num_hidden_layers=3, max_position_embeddings=9000)
    assert len({key(), key(num_key_value_heads=1), key(attention_bias=True), key(attn_implementation="eager")}) == 4
    assert key().startswith("transformers.models.llama.modeling_llama.LlamaForCausalLM:")


def test_the_kind_of_attention_is_kept() -> None:
    settings = {**BIG, "attn_implementation": "eager"}
    small: Any = specimen_of(on_meta("LlamaForCausalLM", "LlamaConfig", settings)).build()
    assert small.config._attn_implementation == "eager"


def test_a_model_that_was_changed_is_no_longer_its_config() -> None:
    settings = {**BIG, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "head_dim": 4}
    model: Any = on_meta("LlamaForCausalLM", "LlamaConfig", settings)
    for layer in model.model.layers:
        layer.mlp.scale = nn.Parameter(torch.ones(32, device="meta"))
    specimen = specimen_of(model)
    small = specimen.build()
    assert "model.layers.1.mlp.scale" in dict(small.named_parameters())
    assert len(small.get_submodule("model.layers")) == KEPT_BLOCKS  # type: ignore[arg-type]
    assert small.get_parameter("model.layers.1.mlp.up_proj.weight").shape == (48, 32)
    assert bool(torch.isfinite(small(**specimen.batch()).loss))


def small_llama() -> Any:
    settings = {
        **BIG,
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": 64,
        "head_dim": 4,
    }
    return on_meta("LlamaForCausalLM", "LlamaConfig", settings)


def test_a_module_of_another_class_is_no_longer_its_config() -> None:
    model = small_llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanh()
    specimen = specimen_of(model)
    assert isinstance(specimen.build().get_submodule("model.layers.1.mlp.act_fn"), nn.Tanh)
    assert specimen.key != specimen_of(small_llama()).key


@pytest.mark.parametrize("kind", ["config", "own"])
def test_a_forward_put_on_a_module_is_refused(kind: str) -> None:
    model: Any = small_llama() if kind == "config" else Mine()
    block = (model.model.layers if kind == "config" else model.blocks)[1]
    block.forward = lambda hidden, **_: hidden
    specimen = specimen_of(model, None if kind == "config" else IDS)
    name = "model.layers.1 (LlamaDecoderLayer)" if kind == "config" else "blocks.1 (Block)"
    with pytest.raises(SpecimenError) as raised:
        specimen.build()
    assert str(raised.value) == (
        f"{name} has a forward of its own, put on the module after it was made: write a class with that forward instead"
    )


def test_answers_are_kept_on_what_is_the_very_same() -> None:
    first, same = specimen_of(small_llama()), specimen_of(small_llama())
    first.answers["question"] = "answer"
    assert same.answers["question"] == "answer"
    mine, other = specimen_of(Mine(), IDS), specimen_of(Mine(), IDS)
    mine.answers["question"] = "answer"
    assert mine.key == other.key
    assert not other.answers


def test_what_is_trained_is_in_the_key() -> None:
    frozen = Mine()
    frozen.tokens.requires_grad_(False)
    assert specimen_of(frozen, IDS).key != specimen_of(Mine(), IDS).key


class Block(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.num_heads = 2
        self.up, self.down = nn.Linear(size, inner), nn.Linear(inner, size)
        self.register_buffer("scale", torch.full((size,), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(self.up(x).relu()) * self.scale
        return y


class Mine(nn.Module):
    """Two kinds of block, a tied head, and a hook."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block(8, 16 if index % 2 else 12) for index in range(depth))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        found: torch.Tensor = self.head(x)
        return found


class Counting(Mine):
    """Runs only with all of its blocks."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert len(self.blocks) == 5
        return super().forward(ids)


IDS = {"ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_any_other_model_has_two_blocks_of_each_kind(device: str) -> None:
    with torch.device(device):
        model = Mine(depth=7)
    calls: list[object] = []
    model.blocks[0].register_forward_hook(lambda *args: calls.append(args))
    specimen = specimen_of(model, IDS)
    small = specimen.build()
    assert isinstance(small, Mine)
    assert [block.up.out_features for block in small.blocks] == [12, 16, 12, 16]  # type: ignore[union-attr]
    assert small.head.weight is small.tokens.weight
    assert {tensor.device.type for tensor in small.state_dict().values()} == {"cpu"}
    scale = small.get_buffer("blocks.0.scale")
    assert torch.equal(scale, torch.full((8,), 3.0)) or device == "meta"
    assert small.training
    assert torch.equal(specimen.batch()["ids"], IDS["ids"])
    assert small(**specimen.batch()).shape == (2, 3, 11)
    assert not calls
    assert len(model.blocks) == 7
    twin = specimen.build()
    assert twin is not small
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), twin.parameters(), strict=True))
    assert specimen.key == specimen_of(Mine(depth=6), IDS).key
    assert specimen.key != specimen_of(Mine(depth=3), IDS).key


def test_a_model_that_needs_all_its_blocks_keeps_them() -> None:
    small = specimen_of(Counting(), IDS).build()
    assert isinstance(small, Counting)
    assert len(small.blocks) == 5


def test_of_an_example_the_model_gets_what_it_takes() -> None:
    """A batch to train on has the labels that a loss of the user's reads."""
    specimen = specimen_of(Mine(depth=7), {**IDS, "labels": IDS["ids"]})
    assert specimen.batch().keys() == IDS.keys()
    assert len(specimen.build().get_submodule("blocks")) == 4  # type: ignore[arg-type]


def test_without_a_batch_there_is_none() -> None:
    assert examine(Mine()).specimen is None


def test_a_model_that_is_too_large_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32_768, 32_768, bias=False))
    with pytest.raises(SpecimenError) as raised:
        specimen_of(model, {"input": torch.zeros(2, 32_768, device="meta")}).build()
    assert str(raised.value) == (
        "with two blocks of each kind the model has 1,073,741,824 parameters, too many to try a plan on (at most 536,870,912): "
        "pass a smaller model of the same kind (model.verify_config)"
    )


def test_a_specimen_of_ones_own_is_taken() -> None:
    mine = specimen_of(Mine(), IDS)
    assert examine(Mine(), IDS, mine).specimen is mine
    assert examine(Mine(), IDS) == examine(Mine(), IDS)


class Settings:
    """As PEFT's: what an adapter is."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.init_lora_weights: bool | str = "pissa"

    def to_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "target_modules": {"q_proj", "v_proj"}}


class Wrapper(nn.Module):
    """As PEFT's own module around a model."""

    def __init__(self, model: nn.Module, settings: Settings, adapter_name: str) -> None:
        super().__init__()
        self.peft_config = {adapter_name: settings}
        self.base_model = model
        self.adapter = nn.Linear(settings.rank, 1)

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, **inputs: Any) -> Any:
        return self.base_model(**inputs)


def test_adapters_are_put_on_the_small_model_too(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("peft")
    vars(package)["get_peft_model"] = Wrapper
    monkeypatch.setitem(sys.modules, "peft", package)
    models = [Wrapper(on_meta("LlamaForCausalLM", "LlamaConfig", BIG), Settings(rank), "mine") for rank in (2, 2, 3)]
    first, same, other = map(specimen_of, models)
    small = first.build()
    assert isinstance(small, Wrapper)
    settings = small.peft_config["mine"]
    assert (settings.rank, settings.init_lora_weights) == (2, True)
    assert models[0].peft_config["mine"].init_lora_weights == "pissa"
    assert small.get_parameter("base_model.lm_head.weight").shape == (256, 64)
    assert bool(torch.isfinite(small(**first.batch()).loss))
    assert first.key == same.key != other.key


def test_patterns_stand_for_any_number() -> None:
    names = ["h.0.mlp.3.weight", "h.12.mlp.0.weight", "0.bias", "conv1.weight"]
    assert [pattern_of(name) for name in names] == ["h.*.mlp.*.weight", "h.*.mlp.*.weight", "*.bias", "conv1.weight"]


def test_integers_of_every_module_are_facts() -> None:
    facts = {fact.name: fact for fact in examine(on_meta("GPT2LMHeadModel", "GPT2Config", {"n_layer": 1})).modules}
    attention = facts["transformer.h.0.attn"]
    assert attention.class_name == "GPT2Attention"
    assert dict(attention.numbers) == {
        "config.n_head": 12,
        "embed_dim": 768,
        "head_dim": 64,
        "layer_idx": 0,
        "num_heads": 12,
        "split_size": 768,
    }
    assert dict(facts["transformer.wte"].numbers) == {"embedding_dim": 768, "num_embeddings": 50257}
    assert list(facts)[:2] == ["", "transformer"]
