"""A folder that transformers' `from_pretrained` loads: config.json, safetensors shards and their index, and the tokenizer."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from colossal_core.errors import ConfigError, Problem

_SHARD_BYTES = 4 << 30


def write_hf_folder(
    config: Any,
    state: Iterable[tuple[str, torch.Tensor]],
    directory: str | Path,
    dtype: torch.dtype,
    *,
    architecture: str,
    tokenizer_file: Path | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Writes full values by full name, one process, one shard in memory at a time; returns the folder.

    config: transformers' config as the model was asked for. state: each tied parameter once, under its full name, and persistent
    buffers; transformers ties again while loading. dtype: of values that float. architecture: class name of the model. Shards are
    named once their number is known; the index is written last, so a folder without one is not complete.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise ConfigError([Problem("export_hf", reason, "name a folder that you may write", str(folder))]) from None
    for old in [*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")]:
        old.unlink()
    names_by_part = _write_parts(state, folder, dtype, shard_bytes)
    _write_index(folder, names_by_part)
    _write_config(config, folder, dtype, architecture)
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
        _write_tokenizer_config(config, folder)
    return folder


def _write_parts(
    state: Iterable[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype, shard_bytes: int
) -> list[dict[str, int]]:
    """Bytes by name of each part; a part is cut before it would grow over `shard_bytes`."""
    from safetensors.torch import save_file

    parts: list[dict[str, int]] = []
    held: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        save_file(held, str(folder / f"model.part{len(parts)}.safetensors"), metadata={"format": "pt"})
        parts.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for name, tensor in state:
        value = tensor.detach()
        value = (value.to(dtype) if value.is_floating_point() else value).cpu().contiguous()
        if held and size + value.nbytes > shard_bytes:
            flush()
            size = 0
        # A copy where the value is still the caller's memory: it may change before the part is written.
        held[name] = value.clone() if value.data_ptr() == tensor.data_ptr() else value
        size += value.nbytes
    flush()
    return parts


def _write_index(folder: Path, parts: list[dict[str, int]]) -> None:
    if len(parts) == 1:
        os.replace(folder / "model.part0.safetensors", folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        os.replace(folder / f"model.part{number}.safetensors", folder / file)
        weight_map.update(dict.fromkeys(names, file))
    total = sum(size for names in parts for size in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_config(config: Any, folder: Path, dtype: torch.dtype, architecture: str) -> None:
    written = copy.deepcopy(config)
    written.architectures = [architecture]
    written.dtype = dtype
    written.save_pretrained(str(folder))


def _write_tokenizer_config(config: Any, folder: Path) -> None:
    """What transformers' AutoTokenizer needs beside tokenizer.json: the general class, and which token ends a document."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {number: token for token, number in vocabulary["model"]["vocab"].items()}
    tokens.update({added["id"]: added["content"] for added in vocabulary.get("added_tokens", ())})
    end = tokens.get(getattr(config, "eos_token_id", None))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **({"eos_token": end} if end is not None else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
