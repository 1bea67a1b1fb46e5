"""`StrategySuite`: what every strategy must keep to. An author subclasses it and states what the strategy can do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from colossal_core.errors import ConfigError
from colossal_core.plugins import BUILTIN, discover
from colossal_core.rank_compute import COMPUTE_PHASES
from colossal_core.strategy import Phase
from colossal_core.testing import probes
from colossal_core.testing.comparison import Row, compare, table
from colossal_core.testing.models import TinyModel, TokenBatches
from colossal_core.testing.parity import BatchBuilder, ModelBuilder, RunRecord, RunSpec, oracle_of, prepare
from colossal_core.testing.pool import WorkerPool
from colossal_core.testing.suites.measured import estimated_bytes, estimated_bytes_of_all
from colossal_core.testing.suites.sealed import SealedSuite
from colossal_core.testing.suites.session import session_pool
from colossal_core.testing.verification import ADAMW, SGD

if TYPE_CHECKING:
    from colossal_core.strategy import Strategy

OPTIMIZERS = {"adamw": ADAMW, "sgd": SGD}


@dataclass(frozen=True)
class WrongConfig:
    """Values of the section that cannot be had. field: dotted path that the error must name; world_size: on how many ranks."""

    values: Mapping[str, Any]
    field: str
    world_size: int = 1


class StrategySuite(SealedSuite, suite=True):
    """Facts about a strategy, and the tests that follow from them.

    name: of the strategy. plugin: of the entry point. section: dotted path of its config, and `config` the values that turn it on.
    axes: mesh axes on which it may communicate. world_sizes: numbers of ranks to run on; more than one needs colossal-comm, and
    colossal-zero for data parallelism. observes_only: it changes no parameter, so that training is bit for bit the same without it.
    wrong_configs: what it must refuse. others: further sections of the config, by dotted path. estimate_slack: how far the state bytes that
    it estimates may be from the measured ones, as a part of these (padding). model, batch: what is trained.
    """

    name: ClassVar[str]
    plugin: ClassVar[str]
    section: ClassVar[str]
    config: ClassVar[Mapping[str, Any]]
    axes: ClassVar[tuple[str, ...]] = ()
    world_sizes: ClassVar[tuple[int, ...]] = (1, 2)
    observes_only: ClassVar[bool] = False
    wrong_configs: ClassVar[tuple[WrongConfig, ...]] = ()
    others: ClassVar[Mapping[str, Any]] = {}
    estimate_slack: ClassVar[float] = 0.0
    model: ClassVar[ModelBuilder] = TinyModel()
    batch: ClassVar[BatchBuilder] = TokenBatches()
    mutant: ClassVar[str | None] = None
    """A planted fault, with which the suite must fail: for the kit's own tests."""

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        small, large = min(cls.world_sizes), max(cls.world_sizes)
        choices: dict[str, Sequence[Any]] = {
            "world_size": cls.world_sizes,
            "ranks": [(small, large), (large, small)] if small != large else [(small, small)],
            "optimizer": list(OPTIMIZERS),
        }
        for argument in (name for name in choices if name in metafunc.fixturenames):
            metafunc.parametrize(argument, choices[argument], ids=[_id(value) for value in choices[argument]])

    @pytest.fixture
    def pool(self, request: pytest.FixtureRequest) -> WorkerPool:
        return session_pool(request.config)

    def spec(self, *, optimizer: str = "adamw", precision: str = "fp64") -> RunSpec:
        """The run of the tests: two microbatches or more on every rank, clipping, unequal numbers of tokens."""
        config = {"batch": {"global_size": 2 * max(4, *self.world_sizes), "micro_size": 1}, "precision": precision}
        made = RunSpec(
            {**config, "optimizer": dict(OPTIMIZERS[optimizer])}, type(self).model, type(self).batch, task="causal-lm"
        )
        return replace(made.with_overrides({**self.others, self.section: self.config}), mutant=self.mutant)

    def without(self, spec: RunSpec) -> RunSpec:
        """The same run without this strategy: its section left out, and its plugin not loaded where it can be."""
        config = json.loads(json.dumps(spec.config))
        inner, *path = config, *self.section.split(".")
        for name in path[:-1]:
            inner = inner.get(name, {})
        inner.pop(path[-1], None)
        names = [info.name for info in discover().infos if info.name not in (BUILTIN, self.plugin)]
        plugins = None if self.plugin == BUILTIN else ",".join(names)
        return replace(spec, config={key: value for key, value in config.items() if value != {}}, plugins=plugins)

    def strategy(self, world_size: int) -> Strategy:
        """The strategy as the config makes it."""
        found = [s for s in prepare(self.spec(), world_size).strategies if s.name == self.name]
        assert found, f"the config {self.section}: {dict(self.config)} makes no strategy named {self.name}"
        return found[0]

    def test_plugin_announces_the_strategy(self) -> None:
        plugins = discover()
        assert self.plugin in [info.name for info in plugins.infos], "no installed plugin has this name"
        spec = {spec.name: spec for spec in plugins.strategies()}.get(self.name)
        assert spec is not None, "the plugin contributes no strategy of this name"
        assert spec.section == self.section
        strategy = self.strategy(min(self.world_sizes))
        assert isinstance(strategy.phase, Phase)
        assert strategy.axes == self.axes
        assert self.observes_only <= (strategy.phase is Phase.OPTIMIZER), (
            "what only observes applies in the phase optimizer"
        )
        assert json.loads(json.dumps(dict(strategy.state()))) == dict(strategy.state()), "state() must be JSON values"

    def test_import_has_no_side_effects(self) -> None:
        if self.plugin == BUILTIN:
            module = "colossal_core.builtin"
        else:
            manager = discover().manager.get_plugin(self.plugin)
            module = str(getattr(manager, "__name__", type(manager).__module__))
        script = Path(__file__).with_name("import_probe.py")
        done = subprocess.run(
            [sys.executable, str(script), module], capture_output=True, text=True, check=False, env=dict(os.environ)
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [], f"importing {module} changes the process"

    def test_unknown_key_is_refused(self) -> None:
        spec = self.spec().with_overrides({f"{self.section}.no_such_key": 1})
        with pytest.raises(ConfigError) as raised:
            prepare(spec, min(self.world_sizes))
        assert [problem.field for problem in raised.value.problems] == [f"{self.section}.no_such_key"]

    def test_wrong_configs_are_explained(self) -> None:
        """Each error names the field and shows the value, says what is allowed and what to do."""
        for wrong in self.wrong_configs:
            spec = self.spec().with_overrides({self.section: wrong.values})
            with pytest.raises(ConfigError) as raised:
                prepare(spec, wrong.world_size)
            named = [problem for problem in raised.value.problems if problem.field == wrong.field]
            assert named, f"no problem names {wrong.field}:\n{raised.value}"
            assert all(problem.reason and problem.remedy for problem in named), str(raised.value)
            key = wrong.field.removeprefix(f"{self.section}.")
            if key in wrong.values:
                assert named[0].value == wrong.values[key], f"the problem does not show the value: {named[0]}"

    def test_every_rank_makes_the_same_plan(self, pool: WorkerPool, world_size: int) -> None:
        """This process too, whose hashes are seeded differently from the ranks'."""
        own = prepare(self.spec(), world_size).plan.fingerprint
        found = pool.run(world_size, plan_fingerprint, self.spec())
        assert found == [own] * world_size

    def test_training_is_the_same_without_it(self, pool: WorkerPool) -> None:
        """Bit for bit: on one process for any strategy, on any number of ranks for one that only observes."""
        spec = self.spec()
        for size in self.world_sizes:
            if size > 1 and not self.observes_only:
                continue  # what changes how a step is computed is compared with the oracle instead
            kept = pool.run(size, probes.record, self.without(spec))
            for one, other in zip(pool.run(size, probes.record, spec), kept, strict=True):
                states = {key: state for key, state in one.states.items() if key in other.states}
                _check(compare(replace(one, states=states), other, limit=0.0))

    def test_matches_the_oracle(self, pool: WorkerPool, world_size: int, optimizer: str) -> None:
        """Loss, raw gradients, norm, parameters and every state of every rank, in float64 to 1e-12."""
        spec = self.spec(optimizer=optimizer)
        oracle = pool.run(1, probes.record, oracle_of(spec))[0]
        _check(compare(pool.run(world_size, probes.record, spec), oracle))

    def test_communicates_on_declared_axes_only(self, pool: WorkerPool, world_size: int) -> None:
        """By the ledger of each rank; what core sends by itself is not counted, and one rank sends nothing at all."""
        strategy, mesh = self.strategy(world_size), prepare(self.spec(), world_size).plan.mesh
        allowed = set(mesh.base_axes(strategy.axes))
        before: set[object] = set()
        if not probes.owns_state(strategy.phase):
            seen = pool.run(world_size, probes.observe, self.without(self.spec()))
            before = {row.kind for observation in seen for row in observation.traffic}
        for observation in pool.run(world_size, probes.observe, self.spec()):
            own = [row for row in observation.traffic if row.tag not in probes.CORE_TAGS and row.kind not in before]
            wrong = [row for row in own if not set(mesh.base_axes(row.axes)) <= allowed]
            assert not wrong, f"declared {strategy.axes}, communicates: {wrong}"

    def test_saves_and_loads_on_another_mesh(self, pool: WorkerPool, ranks: tuple[int, int], tmp_path: Path) -> None:
        """Every tensor comes back bit for bit, and the next step is the one that the saved run makes."""
        spec = replace(self.spec(), num_steps=2)
        saved, after = pool.run(ranks[0], probes.save_and_go_on, spec, str(tmp_path))[0]
        for loaded, step in pool.run(ranks[1], probes.load_and_go_on, spec, str(tmp_path)):
            _check(compare(loaded, saved, limit=0.0))
            _check(compare(RunRecord((step,), {}, {}, ""), RunRecord((after,), {}, {}, "")))

    def test_estimates_the_state_that_it_keeps(self, pool: WorkerPool, world_size: int) -> None:
        """Of the whole parameter state where the strategy owns or cuts it, else of what it adds; on the fullest rank, in bf16."""
        strategy, spec = self.strategy(world_size), self.spec(precision="bf16")
        prepared = prepare(spec, world_size)
        measured = _fullest(pool.run(world_size, probes.observe, spec))
        if strategy.phase in COMPUTE_PHASES:
            estimated = estimated_bytes_of_all(prepared.strategies, prepared.plan)
        else:
            estimated = estimated_bytes(strategy, prepared.plan)
        if strategy.phase not in (*COMPUTE_PHASES, Phase.SHARD_STATE):
            before = _fullest(pool.run(world_size, probes.observe, self.without(spec)))
            measured = {column: size - before[column] for column, size in measured.items()}
        for column, size in measured.items():
            distance = abs(estimated[column] - size)
            assert distance <= self.estimate_slack * size, (
                f"{column}: estimated {estimated[column]:.0f}, measured {size}"
            )


def plan_fingerprint(collectives: Any, spec: RunSpec) -> str:
    """The plan that a rank makes."""
    return prepare(spec, collectives.mesh.world_size).plan.fingerprint


def _fullest(observations: Sequence[probes.Observation]) -> dict[str, int]:
    columns = observations[0].state_bytes
    return {column: max(seen.state_bytes[column] for seen in observations) for column in columns}


def _check(rows: Sequence[Row]) -> None:
    assert all(row.passed for row in rows), f"\n{table(rows)}"


def _id(value: object) -> str:
    return "-to-".join(map(str, value)) if isinstance(value, tuple) else str(value)
