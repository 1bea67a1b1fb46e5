"""Folders of transformers: written by us they load there, written there they load here, equal to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from colossal_core.config.sections import ModelConfig
from colossal_core.errors import CheckpointError, ConfigError
from colossal_core.small_config import shrink_config
from colossal_launch.data.tokenizer import train_bpe
from colossal_launch.models import PretrainedWeights, build_model, write_hf_folder
from colossal_launch.models.architecture import make_config
from colossal_launch.models.building import build_from_config
from colossal_launch.models.weights import REST, all_values

pytest.importorskip("transformers")


def _small(architecture: str, **keys: Any) -> Any:
    return shrink_config(make_config(architecture, keys, vocab_size=None, eos_id=None))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2", "mixtral", "bert"])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 1 << 16])
def test_export_loads_bit_equal(tmp_path: Path, architecture: str, shard_bytes: int) -> None:
    built = build_from_config(_small(architecture), seed=0)
    assert built.weights is not None
    values = dict(built.weights.values(REST, ()))
    name = type(built.module).__name__
    write_hf_folder(built.config, values.items(), tmp_path, torch.float32, architecture=name, shard_bytes=shard_bytes)
    files = sorted(path.name for path in tmp_path.glob("model*"))
    assert (files == ["model.safetensors"]) == (shard_bytes == 1 << 30)
    loaded, report = type(built.module).from_pretrained(str(tmp_path), output_loading_info=True)  # type: ignore[attr-defined]
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    parameters = dict(loaded.named_parameters())
    assert parameters.keys() == values.keys()
    assert all(torch.equal(parameters[key], values[key]) for key in values)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]
    assert loaded.config.use_cache == getattr(built.config, "use_cache", loaded.config.use_cache)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2", "mixtral"])
def test_pretrained_folder_is_read_as_transformers_reads_it(tmp_path: Path, architecture: str) -> None:
    config = _small(architecture)
    torch.manual_seed(0)
    built = build_from_config(config, seed=0)
    reference = type(built.module)(config)
    reference.save_pretrained(str(tmp_path), max_shard_size="100KB")  # type: ignore[operator]
    found = build_model(ModelConfig(pretrained=str(tmp_path)), vocab_size=256, seed=0)
    assert isinstance(found.weights, PretrainedWeights)
    assert found.weights.streamed == (architecture != "mixtral")  # its experts are stored one by one
    lists = [name for name, part in found.module.named_modules() if isinstance(part, torch.nn.ModuleList)]
    blocks = [f"{lists[0]}.{index}" for index in range(2)]
    values = dict(all_values(found.weights, blocks))
    expected = dict(reference.named_parameters())
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)


def test_export_in_another_dtype_with_its_tokenizer(tmp_path: Path) -> None:
    import transformers

    built = build_from_config(_small("llama", eos_token_id=0), seed=0)
    assert built.weights is not None
    values = dict(built.weights.values(REST, ()))
    train_bpe(["some text to learn from"], 257).save(tmp_path / "own.json")
    folder = write_hf_folder(
        built.config,
        values.items(),
        tmp_path / "out",
        torch.bfloat16,
        architecture="LlamaForCausalLM",
        tokenizer_file=tmp_path / "own.json",
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(folder))
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(value, values[name].bfloat16()) for name, value in loaded.named_parameters())
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer("some text").input_ids) == "some text"


def _message(folder: Path, vocab_size: int = 256) -> str:
    with pytest.raises(ConfigError) as caught:
        build_model(ModelConfig(pretrained=str(folder)), vocab_size=vocab_size, seed=0)
    return str(caught.value)


def test_folders_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    remedy = "give a folder that transformers' save_pretrained wrote, with safetensors"
    assert _message(tmp_path) == f"model.pretrained={str(tmp_path)!r}: there is no config.json in it: {remedy}"
    built = build_from_config(_small("llama"), seed=0)
    assert built.weights is not None
    values = dict(built.weights.values(REST, ()))
    built.config.save_pretrained(str(tmp_path))
    assert _message(tmp_path) == (
        f"model.pretrained={str(tmp_path)!r}: there is neither model.safetensors nor model.safetensors.index.json in it: "
        f"{remedy}"
    )
    write_hf_folder(built.config, values.items(), tmp_path, torch.float32, architecture="LlamaForCausalLM")
    assert _message(tmp_path, vocab_size=300) == (
        f"data.tokenizer: the tokenizer has 300 entries, the model 256: use the model's own: data.tokenizer: {tmp_path}"
    )
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert _message(tmp_path).startswith(f"model.pretrained={str(tmp_path)!r}: model.safetensors cannot be read (")
    values["model.norm.weight"] = torch.ones(3)
    write_hf_folder(built.config, values.items(), tmp_path, torch.float32, architecture="LlamaForCausalLM")
    weights = build_model(ModelConfig(pretrained=str(tmp_path)), vocab_size=256, seed=0).weights
    assert weights is not None
    with pytest.raises(CheckpointError) as caught:
        dict(weights.values(REST, ()))
    assert str(caught.value) == (
        f"model.pretrained: model.norm.weight in {path} has shape (3,), the model (64,): "
        "the folder's config.json is not of these weights"
    )
