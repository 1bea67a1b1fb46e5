"""Every implementation that this package announces, and where it fits. The modules are imported when an op is called first."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from colossal_core.ops import OpImplementation
from colossal_kernels.interpreting import interpreted

FLOATS = ("float32", "bfloat16", "float16")
"""Kernels compute in float32: float64 stays with the references."""


@dataclass(frozen=True)
class Entry:
    """op: of core's registry. module: of this package, which has a function of the op's name. dtypes: where it fits, by name."""

    op: str
    module: str
    dtypes: tuple[str, ...] = FLOATS
    priority: int = 10


TRITON = (Entry("rms_norm", "norms.rms_norm"),)


@dataclass(frozen=True)
class Deferred:
    """A function by module and name, imported when it is called first."""

    module: str
    name: str

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.resolved()(*arguments, **keywords)

    def resolved(self) -> Any:
        """The function itself, for callers that compile through it."""
        return getattr(importlib.import_module(f"{__package__}.{self.module}"), self.name)


def implementations() -> tuple[OpImplementation, ...]:
    """All that can run here: Triton's where Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return ()
    devices = ("cuda", "cpu") if interpreted() else ("cuda",)
    return tuple(
        OpImplementation(entry.op, "triton", Deferred(entry.module, entry.op), devices, entry.dtypes, entry.priority)
        for entry in TRITON
    )
