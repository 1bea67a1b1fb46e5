"""What one rank computes of a model, where strategies have changed that: an estimate of memory has to run the same.

Strategies of the phase `shard_compute` put hooks on a model, give modules other forward methods and other sizes, and leave logits cut. A
model that is in training has all of it. On one that is not, it is put on the copy that the trace runs, by the strategies' own `apply` and
with collectives that reach nobody.

Stages of a pipeline are left out: the trace is of the whole model, of which a stage counts by its share. So what a rank in training lacks
of the model comes back on the copy, and its blocks run whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from colossal_core.strategy import ApplyContext, Phase

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.fake_model import FakeModel
    from colossal_core.layout import ParameterLayout
    from colossal_core.mesh import MeshLayout
    from colossal_core.plan import Plan
    from colossal_core.precision import Precision
    from colossal_core.strategy import CrossEntropy, Strategy

COMPUTE_PHASES = (Phase.SPLIT, Phase.SHARD_COMPUTE)
"""The phases whose strategies change what a rank computes; later ones move or wrap what is there."""


@dataclass(frozen=True)
class AbsentParameter:
    """One that other stages of a pipeline hold. names: its own and those tied to it. shape: where it is, on the ranks that differ from this
    one along pp alone.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    trained: bool


class RankCompute(Protocol):
    """How a copy of a model comes to compute what a rank does. hooks: of the model, by the id of their handles, that its copy keeps."""

    @property
    def hooks(self) -> frozenset[int]: ...

    def carry_out(self, fake: FakeModel, precision: Precision) -> CrossEntropy | None:
        """Inside the fake mode: changes the copy where it has to be. Returns what takes the place of the op `cross_entropy`."""


@dataclass(frozen=True)
class AsItIs:
    """The model computes what the rank does: nothing has changed it, or what has is on it. cross_entropy: what a strategy has left. absent:
    what stands on the model in another shape than where it is computed with.
    """

    hooks: frozenset[int] = frozenset()
    cross_entropy: CrossEntropy | None = None
    absent: tuple[AbsentParameter, ...] = ()

    def carry_out(self, fake: FakeModel, precision: Precision) -> CrossEntropy | None:
        del precision
        for one in self.absent:
            dtype = fake.model.get_parameter(one.names[0]).dtype
            _replace(fake.model, one.names, torch.empty(one.shape, dtype=dtype, device="cpu"), trained=one.trained)
        return self.cross_entropy


@dataclass(frozen=True)
class ToBeApplied:
    """The model is whole, and the plan is carried out on its copy. collectives: of the plan's mesh, which send nothing on fake tensors
    and need no other rank. Parameters of the copy get the local shapes of the collectives' rank.
    """

    plan: Plan
    strategies: tuple[Strategy, ...]
    collectives: Collectives
    hooks: frozenset[int] = field(default=frozenset(), init=False)

    def carry_out(self, fake: FakeModel, precision: Precision) -> CrossEntropy | None:
        from colossal_core.modules import ParameterSlots
        from colossal_core.ops import OpTable
        from colossal_core.ops.reference import reference_ops

        plan, model = self.plan, fake.model
        collectives = self.collectives.with_mesh(plan.mesh)
        coordinate = plan.mesh.coordinate(collectives.rank)
        context = ApplyContext(
            collectives=collectives,
            coordinate=coordinate,
            device=torch.device("cpu"),
            precision=precision,
            ops=OpTable({found.op: found for found in reference_ops()}),
            seed=plan.config.train.seed,
            names={id(model.get_parameter(name)): name for name in plan.layouts},
            slots=ParameterSlots(model, [(name, *layout.aliases) for name, layout in plan.layouts.items()]),
            units=plan.units_by_use,
            dropout=fake.dropout,
        )
        for strategy in self.strategies:
            strategy.apply(model, plan, context)
        for name, layout in plan.layouts.items():
            parameter, shape = model.get_parameter(name), _shape_on_its_stage(layout, coordinate, plan.mesh)
            if tuple(parameter.shape) != shape:
                empty = torch.empty(shape, dtype=parameter.dtype, device="cpu")
                _replace(model, (name, *layout.aliases), empty, trained=parameter.requires_grad)
        return context.cross_entropy


def absent_parameters(plan: Plan, coordinate: Mapping[str, int]) -> tuple[AbsentParameter, ...]:
    """What the rank at `coordinate` does not hold of the model."""
    return tuple(
        AbsentParameter((name, *layout.aliases), _shape_on_its_stage(layout, coordinate, plan.mesh), layout.trainable)
        for name, layout in plan.layouts.items()
        if not layout.compute.is_present(coordinate)
    )


def _shape_on_its_stage(layout: ParameterLayout, coordinate: Mapping[str, int], mesh: MeshLayout) -> tuple[int, ...]:
    return replace(layout.compute, present=()).local_shape(coordinate, mesh)


def _replace(model: nn.Module, names: Sequence[str], value: torch.Tensor, *, trained: bool) -> None:
    """One new parameter in every place that holds the old one."""
    made = nn.Parameter(value, requires_grad=trained)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, made)


def rank_compute(plan: Plan, strategies: Sequence[Strategy], collectives: Collectives | None) -> RankCompute:
    """For a model that is not in training. collectives: None where no active strategy changes what a rank computes."""
    changing = tuple(strategy for strategy in strategies if strategy.phase == Phase.SHARD_COMPUTE)
    if not changing:
        return AsItIs()
    assert collectives is not None, f"{[strategy.name for strategy in changing]} need collectives of the plan's mesh"
    return ToBeApplied(plan, changing, collectives)


def hook_ids(model: nn.Module) -> frozenset[int]:
    """The ids of the handles of every forward hook in a model; each is used once in a process."""
    return frozenset(
        key
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for key in hooks
    )
