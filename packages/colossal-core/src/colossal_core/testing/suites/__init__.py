"""The suites that a plugin's author subclasses. They need pytest (the extra `testing`); nothing else of the kit does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_core.testing.suites.checkpoint import CheckpointSuite
    from colossal_core.testing.suites.ops import OpSuite
    from colossal_core.testing.suites.session import session_pool
    from colossal_core.testing.suites.strategy import StrategySuite, WrongConfig

__all__ = ["CheckpointSuite", "OpSuite", "StrategySuite", "WrongConfig", "session_pool"]

_MODULES = {
    "CheckpointSuite": "checkpoint",
    "OpSuite": "ops",
    "StrategySuite": "strategy",
    "WrongConfig": "strategy",
    "session_pool": "session",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
