"""The model that `model` in the config names: a module without storage where that is possible, and the source of its values."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from colossal_core.errors import ConfigError, Problem
from colossal_core.quiet import quiet_transformers
from colossal_launch.models.architecture import import_transformers, make_config, training_class
from colossal_launch.models.initialise import InitialWeights, keyed_random
from colossal_launch.models.meta import parameters_on_meta
from colossal_launch.models.pretrained import PretrainedWeights
from colossal_launch.models.weights import WeightSource

if TYPE_CHECKING:
    from colossal_core.config import ModelConfig


@dataclass(frozen=True)
class BuiltModel:
    """module: as the architecture defines it; its parameters are on the meta device where `weights` is not None.

    weights: where their values come from. config: transformers' config, untouched, for export; None for a factory's model.
    description: one line for the plan.
    """

    module: nn.Module
    weights: WeightSource | None
    config: Any
    description: str

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())


def build_model(
    model: ModelConfig,
    *,
    vocab_size: int | None,
    seed: int,
    eos_id: int | None = None,
    device: torch.device | str = "cpu",
) -> BuiltModel:
    """Builds the model of a config. No parameter of an architecture or a pretrained folder takes memory.

    vocab_size, eos_id: the tokenizer's; None where the data is no text. device: where first values are drawn (they depend on it).
    Raises ConfigError.
    """
    if model.architecture is not None:
        config = make_config(model.architecture, model.config, vocab_size=vocab_size, eos_id=eos_id)
        return build_from_config(config, seed=seed, device=device)
    if model.pretrained is not None:
        return _build_pretrained(model.pretrained, model, vocab_size)
    assert model.factory is not None, "the config is validated: one source is named"
    return _build_from_factory(model.factory, model.config, seed, device)


def build_from_config(config: Any, *, seed: int, device: torch.device | str = "cpu") -> BuiltModel:
    """A model of a transformers config with random weights."""
    used = _used_config(config)
    cls = training_class(used)

    def construct() -> nn.Module:
        with quiet_transformers():
            # A copy each time: transformers writes dtype and implementation into the config that it is given.
            return cls._from_config(copy.deepcopy(used), dtype=torch.float32)  # type: ignore[attr-defined,no-any-return]

    def construct_whole() -> nn.Module:
        with keyed_random(seed, "whole model", torch.device("cpu")):
            return construct()

    try:
        with parameters_on_meta() as constructed, keyed_random(seed, "construction", torch.device("cpu")):
            module = construct()
    except ConfigError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        reason = f"transformers cannot build {cls.__name__} from it ({text})"
        raise ConfigError([Problem("model.config", reason, "change the sizes that are named")]) from error
    weights = InitialWeights(
        module, seed, constructed=constructed.named(module), build_whole=construct_whole, device=device
    )
    return BuiltModel(module, weights, config, f"{cls.__name__} with random weights")


def _used_config(config: Any) -> Any:
    """The config to build with: a copy without the generation cache, which training would only fill."""
    used = copy.deepcopy(config)
    for part in {id(part): part for part in (used, used.get_text_config())}.values():
        if getattr(part, "use_cache", False):
            part.use_cache = False
    return used


def _build_pretrained(folder: str, model: ModelConfig, vocab_size: int | None) -> BuiltModel:
    transformers = import_transformers("model.pretrained", folder)
    path = Path(folder).expanduser()
    remedy = "give a folder that transformers' save_pretrained wrote, with safetensors"
    if not (path / "config.json").is_file():
        raise ConfigError([Problem("model.pretrained", "there is no config.json in it", remedy, folder)])
    if model.config:
        reason = "a pretrained folder has its own config"
        raise ConfigError([Problem("model.config", reason, "leave it out", model.config)])
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        reason = f"transformers cannot read its config.json ({' '.join(str(error).split())})"
        raise ConfigError([Problem("model.pretrained", reason, remedy, folder)]) from None
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if vocab_size is not None and isinstance(rows, int) and rows < vocab_size:
        reason = f"the tokenizer has {vocab_size} entries, the model {rows}"
        raise ConfigError([Problem("data.tokenizer", reason, f"use the model's own: data.tokenizer: {folder}")])
    used = _used_config(config)
    cls = training_class(used)
    with quiet_transformers(), parameters_on_meta():
        module = cls._from_config(used, dtype=torch.float32)  # type: ignore[attr-defined]
    weights = PretrainedWeights(module, cls, path)
    return BuiltModel(module, weights, config, f"{cls.__name__} with the weights of {folder}")


def import_function(name: str, field: str) -> Callable[..., Any]:
    """The function that `package.module:function` names. Raises ConfigError naming `field`."""
    remedy = "give package.module:function, importable where the command runs"
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError([Problem(field, "not of the form package.module:function", remedy, name)])
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError([Problem(field, f"cannot import {module_name} ({error})", remedy, name)]) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError([Problem(field, f"{module_name} has no function {attribute}", remedy, name)])
    return function  # type: ignore[no-any-return]


def _build_from_factory(name: str, config: dict[str, Any], seed: int, device: torch.device | str) -> BuiltModel:
    """A model of the user's own. It is built as its author wrote it; one built on the meta device is initialised unit by unit."""
    function = import_function(name, "model.factory")
    try:
        with keyed_random(seed, "factory", torch.device("cpu")):
            module = function(**config)
    except TypeError as error:
        reason = f"the factory does not take model.config ({error})"
        raise ConfigError([Problem("model.config", reason, f"give the arguments of {name}", config)]) from error
    if not isinstance(module, nn.Module):
        reason = f"returned {type(module).__name__}, not a torch.nn.Module"
        raise ConfigError([Problem("model.factory", reason, "return the module", name)])
    on_meta = any(parameter.is_meta for parameter in module.parameters())
    weights = InitialWeights(module, seed, device=device) if on_meta else None
    return BuiltModel(module, weights, None, f"{type(module).__name__} of {name}")
