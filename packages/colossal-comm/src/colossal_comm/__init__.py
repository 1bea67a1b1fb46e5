"""Communication between ranks: see `colossal_core.collectives` for what it is and `README.md` for how to use it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_comm.bench import BenchRow, bench_collectives
    from colossal_comm.collectives import RankCollectives
    from colossal_comm.environment import Environment, read_environment
    from colossal_comm.ledger import Ledger, LedgerRow
    from colossal_comm.silent import silent_rank
    from colossal_comm.simulated import run_simulated
    from colossal_comm.startup import DEFAULT_TIMEOUT, StoreServer, join, leave

__all__ = [
    "DEFAULT_TIMEOUT",
    "BenchRow",
    "Environment",
    "Ledger",
    "LedgerRow",
    "RankCollectives",
    "StoreServer",
    "bench_collectives",
    "join",
    "leave",
    "read_environment",
    "run_simulated",
    "silent_rank",
]

_MODULES = {
    "DEFAULT_TIMEOUT": "startup",
    "BenchRow": "bench",
    "Environment": "environment",
    "Ledger": "ledger",
    "LedgerRow": "ledger",
    "RankCollectives": "collectives",
    "StoreServer": "startup",
    "bench_collectives": "bench",
    "join": "startup",
    "leave": "startup",
    "read_environment": "environment",
    "run_simulated": "simulated",
    "silent_rank": "silent",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
