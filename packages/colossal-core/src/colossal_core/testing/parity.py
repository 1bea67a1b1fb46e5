"""One run as data, what it leaves behind, and how it is compared with the oracle: the same run in one process, in float64.

`record_run` trains a few steps on one rank of a group and records everything that the contract calls exact. `oracle_of` makes the
specification of the same run with nothing but core: one process, nothing sharded, nothing recomputed, nothing compiled.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from colossal_core.errors import raise_problems
from colossal_core.examine import examine
from colossal_core.float64 import Float64Throughout
from colossal_core.mesh import DATA_AXES
from colossal_core.ops import OP_NAMES, build_op_table, op_problems
from colossal_core.optimizers import OptimizerFactory, optimizer_problems
from colossal_core.plan import Plan, make_plan
from colossal_core.plugins import Plugins, discover
from colossal_core.precision import precision_of
from colossal_core.strategy import Phase
from colossal_core.wrap import Parts, wrap

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.anatomy import Task
    from colossal_core.collectives import Collectives
    from colossal_core.config import TrainConfig
    from colossal_core.loss import LossFunction
    from colossal_core.ops import OpImplementation, OpTable
    from colossal_core.strategy import Strategy
    from colossal_core.testing.mutants import Mutant
    from colossal_core.trained import Trained

Batch = Mapping[str, torch.Tensor]
OptimizerBuilder = Callable[["nn.Module"], "torch.optim.Optimizer | OptimizerFactory"]


class ModelBuilder(Protocol):
    """Makes the model, the same one each time under the same seed."""

    def __call__(self) -> nn.Module: ...


class BatchBuilder(Protocol):
    """Makes the global batch of a step."""

    def __call__(self, step: int, num_sequences: int, /) -> Batch: ...


@dataclass(frozen=True)
class RunSpec:
    """A run that any process can repeat. Callables are importable (`package.module:function`) or can be pickled.

    config: as the user writes it. model: () -> module; it is called under a fixed seed and in float64 throughout. batch: (step, number of
    sequences) -> the GLOBAL batch of a step, of which each rank takes its share. optimizer: model -> instance or factory; None: the
    config's. loss_fn: the user's loss; None: core's choice. task: overrides what `examine` says of a model that transformers
    does not know. plugins: names of the plugins to load, separated by commas; None: all. is_oracle: nothing but core and what
    observes. mutant: name of a planted fault (`colossal_core.testing.mutants`). extra_ops: () -> implementations of ops beside those of
    plugins.
    """

    config: Mapping[str, Any]
    model: ModelBuilder | str
    batch: BatchBuilder | str
    num_steps: int = 3
    optimizer: OptimizerBuilder | str | None = None
    loss_fn: LossFunction | str | None = None
    task: Task | None = None
    plugins: str | None = None
    is_oracle: bool = False
    mutant: str | None = None
    extra_ops: Callable[[], Sequence[OpImplementation]] | str | None = None

    def with_overrides(self, overrides: Mapping[str, Any]) -> RunSpec:
        """This run with config values replaced, by dotted path."""
        config: dict[str, Any] = dict(self.config)
        for path, value in overrides.items():
            _set(config, path.split("."), value)
        return replace(self, config=config)


@dataclass(frozen=True)
class StepRecord:
    """What one step gave: numbers, and every raw gradient as a full tensor."""

    loss: float
    grad_norm: float
    num_tokens: int
    skipped: bool
    gradients: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class RunRecord:
    """What a run gave on one rank, full tensors on the CPU. states: everything registered beside the parameters, by (kind, full name)."""

    steps: tuple[StepRecord, ...]
    parameters: Mapping[str, torch.Tensor]
    states: Mapping[tuple[str, str], torch.Tensor]
    fingerprint: str


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before a rank joins: `prepare` makes it, `start` carries it out."""

    config: TrainConfig
    plugins: Plugins
    strategies: tuple[Strategy, ...]
    model: nn.Module
    plan: Plan
    parts: Parts = field(default_factory=Parts)


def oracle_of(spec: RunSpec) -> RunSpec:
    """The same run for one process in float64, with the strategies that only observe and no other."""
    return replace(spec.with_overrides({"precision": "fp64"}), is_oracle=True, mutant=None)


def prepare(spec: RunSpec, world_size: int) -> Prepared:
    """Config, model and plan of a run. Raises: ConfigError with everything that is wrong."""
    return _prepare(spec, world_size)[0]


def start(spec: RunSpec, collectives: Collectives) -> Trained:
    """The run on this rank, ready for its first step, its planted fault included."""
    prepared, anatomy, ops = _prepare(spec, collectives.mesh.world_size)
    seen = collectives.with_mesh(prepared.plan.mesh)
    mutant = _mutant(spec.mutant)
    if mutant is not None:
        seen = mutant.wrap_collectives(seen, prepared.plan)
    specs = prepared.plugins.optimizers()
    trained = wrap(prepared.model, prepared.plan, anatomy, prepared.strategies, seen, ops, specs, prepared.parts)
    if mutant is not None:
        mutant.change(trained)
    return trained


def share_of_step(spec: RunSpec, plan: Plan, rank: int, step: int) -> dict[str, torch.Tensor]:
    """This rank's share of the global batch of a step."""
    builder: BatchBuilder = _resolved(spec.batch)
    batch = builder(step, plan.batch.global_size)
    index = plan.mesh.flat_index(plan.mesh.coordinate(rank), DATA_AXES)
    share = plan.batch.share
    return {key: value[index * share : (index + 1) * share] for key, value in batch.items()}


def record_run(spec: RunSpec, collectives: Collectives) -> RunRecord:
    """Trains `num_steps` steps and records them. Collective: every rank of the group calls it and gets a whole record.

    Communication: that of the steps, and one all-gather for each gradient of each step, and for each parameter and state at the end.
    """
    trained = start(spec, collectives)
    steps = tuple(
        record_step(trained, share_of_step(spec, trained.plan, collectives.rank, k)) for k in range(spec.num_steps)
    )
    return record_end(trained, steps)


def record_step(trained: Trained, share: Batch) -> StepRecord:
    """Runs one step and records it."""
    result = trained.train_step(share)
    gradients = {name: _kept(gradient) for name, gradient in trained.gradients().items()}
    return StepRecord(
        float(result.loss), float(result.grad_norm), int(result.num_tokens), bool(result.skipped), gradients
    )


def record_end(trained: Trained, steps: Sequence[StepRecord]) -> RunRecord:
    """What a run leaves behind after `steps`."""
    names = list(trained.plan.layouts)
    parameters = {name: _kept(trained.full_parameter(name)) for name in names}
    states = {(kind, name): _kept(tensor) for kind, name, tensor in trained.full_states()}
    return RunRecord(tuple(steps), parameters, states, trained.plan.fingerprint)


_PLANNING = threading.Lock()
"""Ranks that are threads plan one after another: a proof in float64 changes the process's default dtype. They meet before they go on, where
`wrap` compares their plans.
"""


def _prepare(spec: RunSpec, world_size: int) -> tuple[Prepared, Any, Any]:
    with _PLANNING:
        return _prepared(spec, world_size)


def _prepared(spec: RunSpec, world_size: int) -> tuple[Prepared, Any, Any]:
    from colossal_core.config import parse_config

    plugins = discover(allow=spec.plugins)
    config = parse_config(spec.config, plugins.config_class())
    strategies, axis_sizes = plugins.active(config), plugins.axis_sizes(config)
    if spec.is_oracle:
        strategies, axis_sizes = tuple(s for s in strategies if s.phase is Phase.OPTIMIZER), {}
    if spec.optimizer is None:
        raise_problems(optimizer_problems(config, plugins.optimizers()))
    model = _build_model(spec, config)
    anatomy = examine(model, _example(spec))
    if spec.task is not None:
        anatomy = replace(anatomy, task=spec.task)
    if spec.loss_fn is not None:
        anatomy = replace(anatomy, own_loss=True)
    ops = _op_table(spec, plugins, config)
    plan = make_plan(config, anatomy, strategies, axis_sizes, ops, world_size=world_size)
    optimizer = None if spec.optimizer is None else _resolved(spec.optimizer)(model)
    parts = Parts(optimizer=optimizer, loss_fn=None if spec.loss_fn is None else _resolved(spec.loss_fn))
    return Prepared(config, plugins, strategies, model, plan, parts), anatomy, ops


def _op_table(spec: RunSpec, plugins: Plugins, config: TrainConfig) -> OpTable:
    """As the config asks for; the oracle's ops are the references."""
    dtype = str(precision_of(config).compute).removeprefix("torch.")
    extra: Sequence[OpImplementation] = () if spec.extra_ops is None else _resolved(spec.extra_ops)()
    found, asked = (*plugins.ops(), *extra), config.ops.asked(OP_NAMES)
    if spec.is_oracle:
        asked = dict.fromkeys(OP_NAMES, "reference")
    raise_problems(op_problems(found, "cpu", dtype, asked))
    return build_op_table(found, "cpu", dtype, asked)


def _build_model(spec: RunSpec, config: TrainConfig) -> nn.Module:
    """The model, the same bits in every process: seeded, and drawn in float64 whatever it is trained in."""
    builder: ModelBuilder = _resolved(spec.model)
    with torch.random.fork_rng(devices=[]), Float64Throughout():
        torch.manual_seed(config.train.seed)
        model = builder()
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    return model.to(dtype)


def _example(spec: RunSpec) -> Batch:
    builder: BatchBuilder = _resolved(spec.batch)
    return builder(0, 2)


def _mutant(name: str | None) -> Mutant | None:
    if name is None:
        return None
    from colossal_core.testing.mutants import plant

    return plant(name)


def _resolved(found: Any) -> Any:
    """A callable, or the one that `package.module:function` names."""
    if not isinstance(found, str):
        return found
    module, _, function = found.partition(":")
    return getattr(importlib.import_module(module), function)


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its own on the CPU: what is gathered on one rank may be a view of living storage."""
    return tensor.detach().to("cpu", copy=True)


def _set(config: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        inner = config.get(name)
        config[name] = dict(inner) if isinstance(inner, Mapping) else {}
        config = config[name]
    config[path[-1]] = value
