"""The conformance kit: what a plugin's author tests with, and what `colossal verify` runs. Only the suites need pytest."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_core.difference import EXACT, relative_difference
    from colossal_core.testing.comparison import Row, compare, table
    from colossal_core.testing.oracles import Oracles
    from colossal_core.testing.parity import RunRecord, RunSpec, record_run
    from colossal_core.testing.pool import RankError, WorkerPool
    from colossal_core.testing.suites import CheckpointSuite, OpSuite, StrategySuite
    from colossal_core.testing.verification import (
        Variant,
        VerifyReport,
        default_variants,
        model_size_of,
        num_microbatches_of,
        verify,
    )

__all__ = [
    "EXACT",
    "CheckpointSuite",
    "OpSuite",
    "Oracles",
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
    "model_size_of",
    "num_microbatches_of",
    "record_run",
    "relative_difference",
    "table",
    "verify",
]

_MODULES = {
    "EXACT": "colossal_core.difference",
    "CheckpointSuite": "colossal_core.testing.suites",
    "OpSuite": "colossal_core.testing.suites",
    "Oracles": "colossal_core.testing.oracles",
    "RankError": "colossal_core.testing.pool",
    "Row": "colossal_core.testing.comparison",
    "RunRecord": "colossal_core.testing.parity",
    "RunSpec": "colossal_core.testing.parity",
    "StrategySuite": "colossal_core.testing.suites",
    "Variant": "colossal_core.testing.verification",
    "VerifyReport": "colossal_core.testing.verification",
    "WorkerPool": "colossal_core.testing.pool",
    "compare": "colossal_core.testing.comparison",
    "default_variants": "colossal_core.testing.verification",
    "model_size_of": "colossal_core.testing.verification",
    "num_microbatches_of": "colossal_core.testing.verification",
    "record_run": "colossal_core.testing.parity",
    "relative_difference": "colossal_core.difference",
    "table": "colossal_core.testing.comparison",
    "verify": "colossal_core.testing.verification",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
