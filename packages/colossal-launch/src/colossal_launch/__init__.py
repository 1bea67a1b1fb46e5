"""Assembling and running: `launch`, `Booster`, and the command `colossal`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_launch.booster import Booster
    from colossal_launch.session import Ranks, finish, launch

__all__ = ["Booster", "Ranks", "finish", "launch"]

_MODULES = {"Booster": "booster", "Ranks": "session", "finish": "session", "launch": "session"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
