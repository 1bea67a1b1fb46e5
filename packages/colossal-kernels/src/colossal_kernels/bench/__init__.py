"""How fast the kernels are here, beside torch and others: `colossal bench kernels`, and `python -m colossal_kernels.bench.sweep OP` for the
settings of a kernel. What is measured of an op is a small table in `cases/`, in a file of the op's name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_kernels.bench.command import run

__all__ = ["run"]

_MODULES = {"run": "command"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
