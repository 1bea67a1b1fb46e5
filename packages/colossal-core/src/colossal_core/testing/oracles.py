"""The truths that runs are compared with, each computed once."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from colossal_core.collectives import SingleProcess
from colossal_core.testing.parity import RunRecord, RunSpec, oracle_of, record_run
from colossal_core.testing.pool import WorkerPool
from colossal_core.testing.probes import record


class Oracles:
    """The records of runs in one process on the CPU, in float64 (`oracle_of`), each of which serves all runs that differ in nothing but how
    they are shared out, rounded, compiled and recomputed.

    pool: of ranks on the CPU, one of which runs them; None: this process does.
    """

    def __init__(self, pool: WorkerPool | None = None) -> None:
        assert pool is None or pool.device_type == "cpu", pool.device_type
        self._pool = pool
        self._known: dict[str, RunRecord] = {}

    def of(self, spec: RunSpec) -> RunRecord:
        config = {key: value for key, value in spec.config.items() if key not in ("parallel", "compile", "recompute")}
        alone = oracle_of(replace(spec, config=config))
        key = f"{json.dumps(alone.config, sort_keys=True)} {replace(alone, config={}, plugins=None)}"
        if key not in self._known:
            self._known[key] = self._run(alone)
        return self._known[key]

    def _run(self, alone: RunSpec) -> RunRecord:
        if self._pool is None:
            return record_run(alone, SingleProcess(torch.device("cpu")))
        return self._pool.run(1, record, alone)[0]
