"""`CheckpointSuite`: whatever a strategy or an optimizer registers comes back, on the same mesh and on any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from colossal_core.errors import CheckpointError
from colossal_core.testing import probes
from colossal_core.testing.comparison import compare, table
from colossal_core.testing.models import TinyModel, TokenBatches
from colossal_core.testing.parity import BatchBuilder, ModelBuilder, RunRecord, RunSpec
from colossal_core.testing.pool import RankError, WorkerPool
from colossal_core.testing.suites.sealed import SealedSuite
from colossal_core.testing.suites.session import session_pool


class CheckpointSuite(SealedSuite, suite=True):
    """Facts about what is kept, and the tests that follow from them.

    kinds: registered kinds that a checkpoint must hold (`adamw.exp_avg`, `ema`). save_config, load_config: config of the run that saves and
    of the one that loads, by dotted path. meshes: (ranks that save, ranks that load). optimizer: a user's, as `RunSpec.optimizer`.
    """

    kinds: ClassVar[tuple[str, ...]]
    save_config: ClassVar[Mapping[str, Any]]
    load_config: ClassVar[Mapping[str, Any]]
    meshes: ClassVar[tuple[tuple[int, int], ...]] = ((2, 1), (1, 2))
    optimizer: ClassVar[Any] = None
    model: ClassVar[ModelBuilder] = TinyModel()
    batch: ClassVar[BatchBuilder] = TokenBatches()

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        if "ranks" in metafunc.fixturenames:
            metafunc.parametrize("ranks", cls.meshes, ids=[f"{saved}-to-{loaded}" for saved, loaded in cls.meshes])

    @pytest.fixture
    def pool(self, request: pytest.FixtureRequest) -> WorkerPool:
        return session_pool(request.config)

    def spec(self, overrides: Mapping[str, Any], ranks: Sequence[int]) -> RunSpec:
        config = {"batch": {"global_size": 2 * max(ranks), "micro_size": 1}, "precision": "fp64"}
        made = RunSpec(
            config, type(self).model, type(self).batch, num_steps=2, optimizer=type(self).optimizer, task="causal-lm"
        )
        return made.with_overrides(overrides)

    def test_everything_comes_back(self, pool: WorkerPool, ranks: tuple[int, int], tmp_path: Path) -> None:
        """Every kind is there, every element is the one saved, and the next step is the one of the run that saved."""
        saving, loading = self.spec(self.save_config, ranks), self.spec(self.load_config, ranks)
        saved, after = pool.run(ranks[0], probes.save_and_go_on, saving, str(tmp_path))[0]
        assert set(self.kinds) <= {kind for kind, _ in saved.states}, sorted({kind for kind, _ in saved.states})
        for loaded, step in pool.run(ranks[1], probes.load_and_go_on, loading, str(tmp_path)):
            rows = compare(loaded, saved, limit=0.0)
            assert all(row.passed for row in rows), f"\n{table(rows)}"
            rows = compare(RunRecord((step,), {}, {}, ""), RunRecord((after,), {}, {}, ""))
            assert all(row.passed for row in rows), f"\n{table(rows)}"

    def test_previous_checkpoint_is_used_where_the_newest_is_damaged(
        self, pool: WorkerPool, ranks: tuple[int, int], tmp_path: Path
    ) -> None:
        spec = self.spec(self.save_config, ranks)
        pool.run(ranks[0], probes.save_and_go_on, spec, str(tmp_path))
        pool.run(ranks[0], probes.save_and_go_on, replace(spec, num_steps=3), str(tmp_path))
        newest = max(path for path in tmp_path.iterdir() if path.is_dir())
        _damage(newest)
        pool.run(ranks[1], probes.load_and_go_on, self.spec(self.load_config, ranks), str(tmp_path))

    def test_damage_is_named(self, pool: WorkerPool, ranks: tuple[int, int], tmp_path: Path) -> None:
        spec = self.spec(self.save_config, ranks)
        pool.run(ranks[0], probes.save_and_go_on, spec, str(tmp_path))
        damaged = _damage(max(path for path in tmp_path.iterdir() if path.is_dir()))
        with pytest.raises((RankError, CheckpointError)) as raised:
            pool.run(ranks[1], probes.load_and_go_on, self.spec(self.load_config, ranks), str(tmp_path))
        assert damaged.name in str(raised.value)


def _damage(checkpoint: Path) -> Path:
    """Flips one bit in the middle of the last file of tensors."""
    path = max(checkpoint.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    return path
