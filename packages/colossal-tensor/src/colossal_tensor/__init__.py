"""Tensor and sequence parallelism. Found by core through the entry point `tensor`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_tensor.config import TensorConfig

__all__ = ["TensorConfig"]

_MODULES = {"TensorConfig": "config"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
