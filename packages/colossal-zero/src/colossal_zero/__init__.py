"""Data parallelism, and the sharding of training state over it (ZeRO). Found by core through the entry point `zero`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_zero.config import ZeroConfig
    from colossal_zero.flat_state import FlatState
    from colossal_zero.strategy import ZeroStrategy

__all__ = ["FlatState", "ZeroConfig", "ZeroStrategy"]

_MODULES = {"FlatState": "flat_state", "ZeroConfig": "config", "ZeroStrategy": "strategy"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
