"""What an optimizer is, how a plugin announces one, and how a user's own is bound to the masters that this rank owns.

An elementwise optimizer updates every element by itself, so that it runs unchanged on any shard; one that is aware of shards asks the
layouts and the other ranks for what it needs of the whole parameter; any other needs whole parameters. Core's own two are in
`elementwise.py`; a user's is behind the same interface (`foreign_optimizer.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from colossal_core.errors import ConfigError, Problem
from colossal_core.foreign_optimizer import ForeignOptimizer

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.config import OptimizerConfig, TrainConfig
    from colossal_core.ops import OpTable
    from colossal_core.optimizer_state import StateTensor
    from colossal_core.shards import ParameterState, Shard
    from colossal_core.strategy import ApplyContext

Groups = list[dict[str, Any]]
OptimizerFactory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class ClippingOptimizer(Protocol):
    """An optimizer that folds clipping and skipping into its step: no synchronisation, no change of the gradients."""

    @property
    def param_groups(self) -> Groups: ...

    def clipped_step(self, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        """clip: 0-d factor of every gradient. skip: 0-d bool; nothing changes where it is true."""

    def state_tensors(self) -> Iterable[StateTensor]:
        """What a checkpoint holds: all of it from the first moment on, so that it can be loaded before the first step."""


def _nobody_waits(masters: Sequence[torch.nn.Parameter]) -> None:
    del masters


def _no_copies(masters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor] | None:
    del masters
    return None


@dataclass(frozen=True)
class OptimizerContext:
    """What an optimizer may use beside its groups.

    ops: the plan's kernels. collectives: the other ranks, on the plan's mesh. shards: by id() of the master, trained ones only. coordinate:
    this rank's along every axis. device: where its numbers live. seed: the run's. updated: may be called, part by part, with masters
    that the running step is done with: what the next forward pass needs of them is then sent while the others are updated. master_dtype: of
    every master, also where this rank (a pipeline stage) has none; None where nobody has said. blocks: names of the model's blocks. copies:
    for masters that the running step is about to update, where it is to write their new values too, each of its master's shape, in the
    compute dtype; None: nowhere. Who asks writes them, in a skipped step too (ops have an argument for it): so the copies cost no pass of
    their own.
    """

    ops: OpTable
    collectives: Collectives
    shards: Mapping[int, Shard]
    coordinate: Mapping[str, int]
    device: torch.device
    seed: int
    updated: Callable[[Sequence[torch.nn.Parameter]], None] = _nobody_waits
    master_dtype: torch.dtype | None = None
    blocks: frozenset[str] = frozenset()
    copies: Callable[[Sequence[torch.nn.Parameter]], list[torch.Tensor] | None] = _no_copies

    def shard(self, master: torch.Tensor) -> Shard:
        return self.shards[id(master)]

    def gradient(self, master: torch.Tensor) -> torch.Tensor | None:
        """The reduced, unclipped gradient, to be read only: of the master's shape, in the gradient dtype. None before the first one."""
        return self.shards[id(master)].gradient


@dataclass(frozen=True)
class OptimizerSpec:
    """How a plugin announces an optimizer. state_elements: optimizer-state elements kept for each parameter element.

    factory: (parameter groups of masters, config, context) -> optimizer. A group is a dict with `params`, `decayed` (whether `no_decay`
    leaves it in) and, where it is not decayed, `weight_decay` 0; on a pipeline stage that has nothing to train there are no groups. keys:
    the keys of the `optimizer` section that it reads; writing another one is an error. on_shards: `elementwise`, every element is updated
    by itself; `aware`, it reads layouts and asks other ranks for what it needs of a whole parameter; `whole`, it needs whole parameters,
    and is refused where masters are sharded.
    """

    name: str
    factory: Callable[[Groups, OptimizerConfig, OptimizerContext], ClippingOptimizer]
    state_elements: Callable[[OptimizerConfig], int]
    keys: tuple[str, ...]
    on_shards: Literal["elementwise", "aware", "whole"] = "elementwise"

    def state_bytes(self, config: OptimizerConfig, master_bytes: int) -> float:
        """Bytes of optimizer state for each trained element. master_bytes: of one element of a master (8 under fp64).

        AdamW: 8 as fp32, 4 as bf16, 2 + 2 * 4 / 256 as int8; 16 under fp64.
        """
        return self.state_elements(config) * moment_bytes(config, master_bytes)


def moment_bytes(config: OptimizerConfig, master_bytes: int) -> float:
    """Bytes of one element of one moment, with its share of the scale where it is quantised."""
    if master_bytes == 8:
        return 8.0
    return {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4.0 / 256.0}[config.states]


def with_defaults(groups: Groups, defaults: Mapping[str, Any]) -> Groups:
    """Groups with every setting filled in, each of their own."""
    return [{**defaults, **group} for group in groups]


ALWAYS_KEYS = ("name", "max_grad_norm")
ELEMENTWISE_TORCH = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
"""torch.optim classes whose update is elementwise, read in torch 2.13. Adafactor and Muon read rows, columns or matrices."""


def build_optimizer(
    given: torch.optim.Optimizer | OptimizerFactory | None,
    config: TrainConfig,
    specs: Mapping[str, OptimizerSpec],
    context: ApplyContext,
) -> ClippingOptimizer:
    """The optimizer over this rank's masters. Phase shard_state has been applied.

    given: an instance with empty state on the user's parameters (re-pointed in place, group settings kept), a factory called with the
    masters, or None (the config's).

    Raises: ConfigError for an instance with state, a parameter that is not the model's, config keys beside an optimizer of the user's, an
    optimizer that cannot run on sharded masters or whose step needs a closure.
    """
    state = context.parameter_state()
    shards = [shard for shard in state.shards.values() if shard.layout.trainable]
    if given is None:
        return _from_config(config, specs[config.optimizer.name], context, shards)
    extra = [key for key in sorted(config.optimizer.model_fields_set) if key not in ("max_grad_norm", "elementwise")]
    if extra and config.was_set("optimizer"):
        reason = "is set beside an optimizer that was handed to boost"
        raise ConfigError(
            Problem(f"optimizer.{key}", reason, "set it on the optimizer, and remove it here") for key in extra
        )
    if isinstance(given, torch.optim.Optimizer):
        _repoint(given, state, context.names)
        made = given
    else:
        made = _made(given, [shard.master for shard in shards], context)
    _refuse_unfit(made, config, shards)
    return ForeignOptimizer(made, {id(shard.master): shard for shard in shards}, context.collectives)


def _made(factory: OptimizerFactory, masters: list[torch.nn.Parameter], context: ApplyContext) -> torch.optim.Optimizer:
    """torch's optimizers refuse an empty list: where this rank has nothing to train, one is made of a vector that it then loses, so that
    its groups and their settings are there.
    """
    if masters:
        return factory(masters)
    stand_in = torch.nn.Parameter(torch.zeros(1, dtype=context.precision.master, device=context.device))
    made = factory([stand_in])
    for group in made.param_groups:
        group["params"] = []
    made.state.clear()
    return made


def _from_config(
    config: TrainConfig, spec: OptimizerSpec, context: ApplyContext, shards: list[Shard]
) -> ClippingOptimizer:
    section = config.optimizer
    turn = {unit: index for index, unit in enumerate(context.units)}
    # What is used first is updated and sent first.
    shards = sorted(shards, key=lambda shard: turn.get(shard.layout.block, 0))
    if spec.on_shards == "whole" and any(shard.layout.state.cut_axes for shard in shards):
        reason = "it needs whole parameters, and the masters are sharded"
        raise ConfigError(
            [Problem("optimizer.name", reason, "use parallel.zero.stage: 0, or another optimizer", spec.name)]
        )
    decayed = [s.master for s in shards if section.no_decay == "none" or len(s.layout.shape) >= 2]
    rest = [s.master for s in shards if not (section.no_decay == "none" or len(s.layout.shape) >= 2)]
    # Vectors first: they are few, and every unit has some, so that none could be sent before they are updated.
    groups: Groups = [{"params": rest, "decayed": False, "weight_decay": 0.0}] if rest else []
    if decayed:
        groups.append({"params": decayed, "decayed": True})
    seen = OptimizerContext(
        ops=context.ops,
        collectives=context.collectives,
        shards={id(shard.master): shard for shard in shards},
        coordinate=context.coordinate,
        device=context.device,
        seed=context.seed,
        updated=context.parameter_state().updated,
        master_dtype=context.precision.master,
        blocks=frozenset(context.blocks),
        copies=context.parameter_state().copies,
    )
    return spec.factory(groups, section, seen)


def optimizer_problems(config: TrainConfig, specs: Mapping[str, OptimizerSpec]) -> Iterable[Problem]:
    """What is wrong with the `optimizer` section when the optimizer comes from it."""
    spec = specs.get(config.optimizer.name)
    if spec is None:
        remedy = f"use one of {', '.join(sorted(specs))}"
        yield Problem("optimizer.name", "no installed package has this optimizer", remedy, config.optimizer.name)
        return
    for key in sorted(config.optimizer.model_fields_set - set(spec.keys) - set(ALWAYS_KEYS)):
        yield Problem(
            f"optimizer.{key}", f"{spec.name} does not read it", f"remove it; {spec.name} reads {', '.join(spec.keys)}"
        )
    if config.precision == "fp16" and "masters" in spec.keys and config.optimizer.masters == "compute":
        reason = "masters in fp16 lose updates below 2^-11 of a parameter, and its smallest values to zero"
        yield Problem("optimizer.masters", reason, "use precision: bf16, or masters: fp32", "compute")


def _repoint(optimizer: torch.optim.Optimizer, state: ParameterState, names: Mapping[int, str]) -> None:
    """Replaces the user's parameters in every group by the masters of this rank; frozen ones, and those of other ranks, are left out."""
    if optimizer.state:
        raise ConfigError(
            [
                Problem(
                    "optimizer",
                    "the instance handed to boost already has state",
                    "hand over a fresh one; one that makes its state when it is built (Adagrad) as a factory `params -> optimizer`",
                )
            ]
        )
    for group in optimizer.param_groups:
        masters = []
        for parameter in group["params"]:
            if id(parameter) not in names:
                reason = f"holds a parameter of shape {tuple(parameter.shape)} that is not one of the model's"
                raise ConfigError([Problem("optimizer", reason, "build it on model.parameters()")])
            shard = state.shards.get(names[id(parameter)])
            if shard is not None and shard.layout.trainable:
                masters.append(shard.master)
        group["params"] = masters


def _refuse_unfit(optimizer: torch.optim.Optimizer, config: TrainConfig, shards: list[Shard]) -> None:
    kind = type(optimizer)
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        reason = f"{kind.__name__}.step needs a closure that runs the model, and core runs it"
        raise ConfigError([Problem("optimizer", reason, "use an optimizer whose step needs none")])
    known = kind.__module__.startswith("torch.optim") and kind.__name__ in ELEMENTWISE_TORCH
    sharded = any(shard.layout.state.cut_axes for shard in shards)
    if sharded and not known and not config.optimizer.elementwise:
        reason = f"{kind.__name__} is not known to update every element by itself, and the masters are sharded"
        whole = "parallel.zero.stage: 0"
        if any(shard.layout.compute.cut_axes for shard in shards):
            whole += " and no tensor parallelism"
        remedy = f"set optimizer.elementwise: true if it does, or use {whole}"
        raise ConfigError([Problem("optimizer", reason, remedy)])
