"""What a strategy is: a Protocol with a frozen config. Read this file to write one; `docs/write-a-plugin.md` walks through it.

A strategy is pure until `apply`: `check`, `plan` and `estimate` see data only (config, anatomy, mesh, the plan so far) and run without a
GPU and without a process group. `apply` then carries the plan out on a real model, in exactly one phase. Strategies never know one
another; they meet in the plan.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from pydantic import BaseModel
    from torch import nn

    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.collectives import Collectives
    from colossal_core.config import TrainConfig
    from colossal_core.errors import Problem
    from colossal_core.estimate import EstimateTable, HardwareProfile
    from colossal_core.keyed_dropout import KeyedDropoutState
    from colossal_core.layout import Placement
    from colossal_core.mesh import MeshLayout
    from colossal_core.modules import ParameterSlots
    from colossal_core.ops import OpTable
    from colossal_core.plan import Plan, PlanDraft
    from colossal_core.precision import Precision
    from colossal_core.program import Action
    from colossal_core.rank_compute import RankCompute
    from colossal_core.shards import ParameterState
    from colossal_core.stages import Stages


class Phase(enum.IntEnum):
    """When a strategy is applied. Phases, then names, decide the order; never the order of registration."""

    SPLIT = 1
    SHARD_COMPUTE = 2
    RECOMPUTE = 3
    COMPILE = 4
    SHARD_STATE = 5
    MATERIALISE = 6
    OPTIMIZER = 7


class Strategy(Protocol):
    """One way of spreading or transforming a model.

    name: unique among the installed. axes: the mesh axes on which it may communicate. phase: when it is applied. config: its own section.
    after: names of strategies that may touch the same parameter in the same phase, before this one.
    """

    @property
    def name(self) -> str: ...

    @property
    def axes(self) -> tuple[str, ...]: ...

    @property
    def phase(self) -> Phase: ...

    @property
    def after(self) -> tuple[str, ...]: ...

    @property
    def config(self) -> BaseModel: ...

    def check(self, config: TrainConfig, anatomy: ModelAnatomy, mesh: MeshLayout) -> list[Problem]:
        """Everything that makes this strategy impossible here, at once; empty when it can be done."""

    def plan(self, draft: PlanDraft, anatomy: ModelAnatomy) -> PlanDraft:
        """The draft with this strategy's decisions written in: layouts, block decisions, program."""

    def estimate(self, table: EstimateTable, profile: HardwareProfile) -> EstimateTable:
        """Adds this strategy's bytes and seconds to a table of candidate plans, one row a candidate. Closed forms only."""

    def apply(self, model: nn.Module, plan: Plan, context: ApplyContext) -> None:
        """Carries the plan out on this rank's model. Registers step hooks and tensors with the context."""

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint must hold beside tensors: JSON values, equal on every rank."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` returned."""


def no_axes(section: Any) -> Mapping[str, int]:
    """For a strategy that asks for no mesh axis of its own."""
    del section
    return {}


@dataclass(frozen=True)
class StrategySpec:
    """How a plugin announces a strategy. section: the dotted path of its config (`parallel.zero`, or a top-level name of its own).

    config_class: the pydantic class of that section. factory: config section -> Strategy, or None where the section asks for nothing.
    The section's default (`config_class()`) stands where the user writes none, and `factory` says by None that it is then not there.
    axis_sizes: config section -> sizes that it gives to base axes of the mesh (`{"tp": 2}`). What is left over of the ranks is dp_shard.
    show_schedule: of a strategy that writes the plan's program: what `colossal plan --show-schedule` prints of it. Given a file, it draws
    the same there as PNG. Costs are estimates from the plan and the model alone; what a run of the plan has recorded stands beside them.
    """

    name: str
    section: str
    config_class: type[BaseModel]
    factory: Callable[[Any], Strategy | None]
    axis_sizes: Callable[[Any], Mapping[str, int]] = no_axes
    show_schedule: Callable[[Plan, ModelAnatomy, Path | None], str] | None = None


class CrossEntropy(Protocol):
    """The loss of logits that a strategy leaves cut, where nothing but core's loss reads them."""

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, /, *, overwrite: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of losses and number of items, both 0-d, the same on every rank that has a part of the logits. overwrite: the gradient of the
        logits may be written over them.
        """

    def reading(self) -> AbstractContextManager[None]:
        """While it is open, a forward pass gives cut logits; in any other, whoever calls the model gets them whole."""


class ActionRecorder(Protocol):
    """Is told by the runner when the actions of a step begin and end. It must not wait for the device."""

    def begin(self, action: Action) -> None:
        """This rank begins an action."""

    def arrived(self) -> None:
        """What the running action has waited for is there: on an accelerator, the stream goes on when it is."""

    def end(self) -> None:
        """The action that began last has ended. Of the last one, a reduction, it is told again when all reductions have."""


class Replayable(Protocol):
    """State of the running microbatch that a forward pass reads (the dropout key): recomputation captures it and brings it back."""

    def capture(self) -> Any: ...

    def replay(self, captured: Any) -> AbstractContextManager[None]: ...


HookEvent = Literal["before_step", "before_microbatch", "gradients_ready", "before_optimizer", "after_step"]
HOOK_EVENTS: tuple[HookEvent, ...] = (
    "before_step",
    "before_microbatch",
    "gradients_ready",
    "before_optimizer",
    "after_step",
)


@dataclass(frozen=True)
class StepView:
    """What a step hook sees: local tensors only.

    step: the number of finished steps. microbatch: index of the one about to run, else -1. parameters: this rank's parameter state
    (masters and reduced gradients, by full name). grad_norm, loss, num_tokens: 0-d tensors once they are known, else None.
    """

    step: int
    microbatch: int
    parameters: ParameterState
    grad_norm: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None


StepHook = Callable[[StepView], None]


class StepHooks:
    """The step hooks of one trained model, called in the order in which strategies were applied."""

    def __init__(self) -> None:
        self._hooks: dict[HookEvent, list[StepHook]] = {event: [] for event in HOOK_EVENTS}

    def add(self, event: HookEvent, hook: StepHook) -> None:
        assert event in self._hooks, f"no event {event}; there are {HOOK_EVENTS}"
        self._hooks[event].append(hook)

    def call(self, event: HookEvent, view: StepView) -> None:
        for hook in self._hooks[event]:
            hook(view)


@dataclass
class RegisteredTensor:
    """A tensor that a strategy or an optimizer keeps beside the parameters. `local` is this rank's part, contiguous."""

    kind: str
    full_name: str
    local: torch.Tensor
    placement: Placement


class TensorRegistry:
    """Every tensor of the training state, by (kind, full name): save, reshard, verify and estimate treat all kinds alike.

    Kinds: `parameter` (the master), `buffer`, `adamw.exp_avg`, `ema`, ... A kind starts with the name of whoever registers it.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, str], RegisteredTensor] = {}

    def add(self, kind: str, full_name: str, local: torch.Tensor, placement: Placement) -> None:
        key = (kind, full_name)
        assert key not in self._tensors, f"{kind} of {full_name} is registered twice"
        self._tensors[key] = RegisteredTensor(kind, full_name, local, placement)

    def get(self, kind: str, full_name: str) -> RegisteredTensor | None:
        return self._tensors.get((kind, full_name))

    def replace_kind_prefix(self, prefix: str) -> None:
        """Forgets all kinds that start with `prefix`: for a caller that registers them anew."""
        self._tensors = {key: tensor for key, tensor in self._tensors.items() if not key[0].startswith(prefix)}

    def of_kind(self, kind: str) -> dict[str, RegisteredTensor]:
        return {tensor.full_name: tensor for tensor in self._tensors.values() if tensor.kind == kind}

    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kind for kind, _ in self._tensors))

    def __iter__(self) -> Iterator[RegisteredTensor]:
        return iter(self._tensors.values())

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass
class ApplyContext:
    """What `apply` may use and fill: the only mutable meeting point of strategies.

    collectives: the other ranks. coordinate: this rank's, along every axis. parameters: the parameter state, set by the strategy of phase
    shard_state and there for later phases. units: the plan's, in the order of their use; blocks: those of them that are blocks. names:
    full name by id() of the user's parameter objects, aliases resolved. slots: every place in the module tree that holds a parameter.
    replayed: per-call state that recomputation must bring back for its microbatch. cross_entropy: set by a strategy that leaves the
    logits of a head cut: it takes the place of the op of that name, in training and in evaluation. dropout: what the model's dropouts
    read; a strategy says by `module.keyed_layer.part` that a module sees a part of each sample, by `fused_part.seed_by_part` the same of
    one that draws inside a kernel. computes: what strategies have changed of what this rank computes, set when they have. stages: set by
    a strategy that has cut the model into stages. recorder: of the step that is about to run; None, nearly always: nobody records it.
    """

    collectives: Collectives
    coordinate: Mapping[str, int]
    device: torch.device
    precision: Precision
    ops: OpTable
    seed: int
    names: dict[int, str]
    slots: ParameterSlots
    units: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    replayed: list[Replayable] = field(default_factory=list)
    hooks: StepHooks = field(default_factory=StepHooks)
    tensors: TensorRegistry = field(default_factory=TensorRegistry)
    parameters: ParameterState | None = None
    cross_entropy: CrossEntropy | None = None
    dropout: KeyedDropoutState | None = None
    computes: RankCompute | None = None
    stages: Stages | None = None
    recorder: ActionRecorder | None = None

    def parameter_state(self) -> ParameterState:
        assert self.parameters is not None, "phase shard_state has not been applied yet"
        return self.parameters
