"""Adapters of the package PEFT on a model (LoRA and its kin), and the same ones put on another. PEFT is not imported before that."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Adapters:
    """base: the model that they are on, as it is in training. configs: PEFT's, by the adapters' names. wrapped: whether PEFT's own module
    stands around the model, else they were put into it (`model.add_adapter`).
    """

    base: nn.Module
    configs: Mapping[str, Any]
    wrapped: bool

    def described(self) -> dict[str, Any]:
        """The configs as plain data."""
        return {name: config.to_dict() for name, config in self.configs.items()}

    def put_on(self, model: nn.Module) -> nn.Module:
        """The model with adapters of these configs, new ones: weights that the configs would read or compute are drawn."""
        peft: Any = importlib.import_module("peft")
        found: Any = model
        for number, (name, config) in enumerate(self.configs.items()):
            own = copy.deepcopy(config)
            if isinstance(getattr(own, "init_lora_weights", None), str):
                own.init_lora_weights = True
            if not self.wrapped:
                found.add_adapter(own, adapter_name=name)
            elif number == 0:
                found = peft.get_peft_model(found, own, adapter_name=name)
            else:
                found.add_adapter(name, own)
        result: nn.Module = found
        return result


def adapters_of(model: nn.Module) -> Adapters | None:
    """The adapters of a model; None where it has none."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        return None
    get_base_model = getattr(model, "get_base_model", None)
    if not callable(get_base_model):
        return Adapters(model, configs, wrapped=False)
    base = get_base_model()
    assert isinstance(base, nn.Module)
    return Adapters(base, configs, wrapped=True)
