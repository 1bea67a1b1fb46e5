"""Values from a folder of transformers' `save_pretrained`, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from colossal_core.errors import CheckpointError, ConfigError, Problem
from colossal_core.quiet import quiet_transformers
from colossal_launch.models.weights import WholeModel, alias_table, as_value, unit_of

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class PretrainedWeights:
    """Values of `module` (parameters on the meta device) from the safetensors files in `folder`. A `WeightSource`.

    Where the files name every parameter as the model does, or by an alias of a tied one, each tensor is read by itself, when it is asked
    for. Where they do not (transformers renames or fuses weights of some architectures while loading), transformers loads the
    whole model on the CPU once.
    """

    def __init__(self, module: nn.Module, cls: type[nn.Module], folder: Path) -> None:
        self._folder = folder
        self._files = _tensor_files(folder)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        buffers = dict(module.named_buffers())
        persistent = set(module.state_dict(keep_vars=True)) & set(buffers)
        self._buffers = {name: tuple(buffers[name].shape) for name in sorted(persistent)}
        self._sources = _sources((*self._shapes, *self._buffers), alias_table(module), self._files)
        missing_buffers = tuple(name for name, buffer in buffers.items() if buffer.is_meta and name not in persistent)
        self.streamed = self._sources is not None and not missing_buffers

        def load() -> nn.Module:
            with quiet_transformers():
                loaded: nn.Module = cls.from_pretrained(  # type: ignore[attr-defined]
                    str(folder), local_files_only=True, dtype=torch.float32, device_map=None
                )
            return loaded.eval()

        self._whole = WholeModel(load, (*self._buffers, *missing_buffers), [])

    def values(self, unit: str, blocks: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightSource`. Raises CheckpointError where a file is damaged or a tensor has another shape."""
        if not self.streamed:
            yield from self._whole.values(unit, blocks)
            return
        blocks = frozenset(blocks)
        for name in (*self._shapes, *self._buffers):
            if unit_of(name, blocks) == unit:
                yield name, self.read(name)

    def read(self, full_name: str) -> torch.Tensor:
        """One full value, float32 where it floats."""
        from safetensors import SafetensorError, safe_open

        assert self._sources is not None, "the files name weights otherwise: only `values` can read them"
        stored = self._sources[full_name]
        path = self._folder / self._files[stored]
        try:
            with safe_open(str(path), framework="pt", device="cpu") as reader:
                value: torch.Tensor = reader.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"model.pretrained: {path} cannot be read ({error}): copy the folder again"
            ) from error
        wanted = self._shapes.get(full_name, self._buffers.get(full_name))
        if tuple(value.shape) != wanted:
            raise CheckpointError(
                f"model.pretrained: {stored} in {path} has shape {tuple(value.shape)}, the model {wanted}: "
                "the folder's config.json is not of these weights"
            )
        return as_value(value)


def _tensor_files(folder: Path) -> dict[str, str]:
    """File name by tensor name."""
    remedy = "give a folder that transformers' save_pretrained wrote, with safetensors"
    index = folder / _INDEX
    if index.is_file():
        table: Mapping[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        absent = sorted({file for file in table.values() if not (folder / file).is_file()})
        if absent:
            reason = f"{', '.join(absent)} of {_INDEX} is not there"
            raise ConfigError([Problem("model.pretrained", reason, "copy the folder again", str(folder))])
        return dict(table)
    if not (folder / _SINGLE).is_file():
        reason = f"there is neither {_SINGLE} nor {_INDEX} in it"
        raise ConfigError([Problem("model.pretrained", reason, remedy, str(folder))])
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(folder / _SINGLE), framework="pt") as reader:
            return dict.fromkeys(reader.keys(), _SINGLE)
    except (SafetensorError, OSError) as error:
        reason = f"{_SINGLE} cannot be read ({error})"
        raise ConfigError([Problem("model.pretrained", reason, "copy the folder again", str(folder))]) from None


def _sources(names: Collection[str], aliases: Mapping[str, str], files: Mapping[str, str]) -> dict[str, str] | None:
    """Stored name by full name; None where some parameter is stored under no name of its own."""
    by_full_name: dict[str, list[str]] = {}
    for alias, full_name in aliases.items():
        by_full_name.setdefault(full_name, []).append(alias)
    found = {}
    for name in names:
        stored = next((known for known in (name, *by_full_name.get(name, ())) if known in files), None)
        if stored is None:
            return None
        found[name] = stored
    return found
