"""Kernels of core's operations. Found by core through the entry point `kernels`; installing the package is all there is to do."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_kernels.builds import Build, BuildReport, compile_build
    from colossal_kernels.table import implementations

__all__ = ["Build", "BuildReport", "compile_build", "implementations"]

_MODULES = {"Build": "builds", "BuildReport": "builds", "compile_build": "builds", "implementations": "table"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
