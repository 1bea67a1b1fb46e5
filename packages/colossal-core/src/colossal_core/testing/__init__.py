"""The conformance kit: what a plugin's author tests with, and what `colossal verify` runs. Only the suites need pytest."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_core.testing.comparison import Row, compare, table
    from colossal_core.testing.difference import EXACT, relative_difference
    from colossal_core.testing.parity import RunRecord, RunSpec, record_run
    from colossal_core.testing.pool import RankError, WorkerPool
    from colossal_core.testing.suites import CheckpointSuite, OpSuite, StrategySuite
    from colossal_core.testing.verification import Variant, VerifyReport, default_variants, verify

__all__ = [
    "EXACT",
    "CheckpointSuite",
    "OpSuite",
    "RankError",
    "Row",
    "RunRecord",
    "RunSpec",
    "StrategySuite",
    "Variant",
    "VerifyReport",
    "WorkerPool",
    "compare",
    "default_variants",
    "record_run",
    "relative_difference",
    "table",
    "verify",
]

_MODULES = {
    "EXACT": "difference",
    "CheckpointSuite": "suites",
    "OpSuite": "suites",
    "RankError": "pool",
    "Row": "comparison",
    "RunRecord": "parity",
    "RunSpec": "parity",
    "StrategySuite": "suites",
    "Variant": "verification",
    "VerifyReport": "verification",
    "WorkerPool": "pool",
    "compare": "comparison",
    "default_variants": "verification",
    "record_run": "parity",
    "relative_difference": "difference",
    "table": "comparison",
    "verify": "verification",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
