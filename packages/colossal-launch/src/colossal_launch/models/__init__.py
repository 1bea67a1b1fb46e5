"""From `model` in the config to a module without storage, and to the values of its parameters, unit by unit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colossal_core.small_config import shrink_config
    from colossal_launch.models.building import BuiltModel, build_model
    from colossal_launch.models.export import write_hf_folder
    from colossal_launch.models.initialise import InitialWeights
    from colossal_launch.models.meta import parameters_on_meta
    from colossal_launch.models.pretrained import PretrainedWeights
    from colossal_launch.models.weights import WeightSource

__all__ = [
    "BuiltModel",
    "InitialWeights",
    "PretrainedWeights",
    "WeightSource",
    "build_model",
    "parameters_on_meta",
    "shrink_config",
    "write_hf_folder",
]

_HOMES = {
    "BuiltModel": "colossal_launch.models.building",
    "InitialWeights": "colossal_launch.models.initialise",
    "PretrainedWeights": "colossal_launch.models.pretrained",
    "WeightSource": "colossal_launch.models.weights",
    "build_model": "colossal_launch.models.building",
    "parameters_on_meta": "colossal_launch.models.meta",
    "shrink_config": "colossal_core.small_config",
    "write_hf_folder": "colossal_launch.models.export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
