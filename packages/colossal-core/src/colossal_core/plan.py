"""The plan: everything that is decided before any rank starts, as pure data. Made without a GPU and without a process group.

`make_plan` asks every strategy to check, collects ALL problems, then lets each write its decisions into a draft, in the order in which
they will be applied. The result is printed, fingerprinted (ranks compare it before the first collective) and handed to `wrap`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from colossal_core.batch import InputCut
from colossal_core.errors import ConfigError, Problem, raise_problems
from colossal_core.layout import ParameterLayout, Placement
from colossal_core.mesh import BASE_AXES, DATA_AXES, LOSS_AXES, MeshLayout
from colossal_core.model_ops.planning import REFERENCE, plan_model_ops
from colossal_core.plan_problems import conflicts, core_problems, layout_problems, program_problems
from colossal_core.program import Program, plain_program

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.config import TrainConfig
    from colossal_core.ops import OpTable
    from colossal_core.strategy import Phase, Strategy


@dataclass(frozen=True)
class BatchPlan:
    """Sequences: in one step over all ranks, in one step on one rank (`share`), in one forward pass; and how many of those."""

    global_size: int
    share: int
    micro_size: int
    num_microbatches: int


@dataclass(frozen=True)
class Gathering:
    """When a unit's compute copy is whole, if it is not always (ZeRO-3). A unit is a block, or a module outside every block.

    keep: how long one gather lasts: `always` (nothing is released), `step` (gathered once for all microbatches of a step), `microbatch`
    (from the forward pass to the backward pass of each), `use` (a block is released after its forward pass, and gathered again for its
    backward pass). Modules outside every block are kept from the forward to the backward pass of a microbatch in any case. prefetch: how
    many blocks ahead a gather is started.
    """

    keep: Literal["always", "step", "microbatch", "use"] = "always"
    prefetch: int = 1


@dataclass(frozen=True)
class PlanDraft:
    """A plan in the making. Strategies return changed copies; nothing is changed in place.

    layouts: by full name, in the order of `named_parameters()`. block_names: the model's blocks, in
    order of execution. decisions: kind (`recompute`) -> block -> value. program: the actions of
    every pp rank. stage_units: units (as in `Plan.units`) by pipeline stage, a unit on every stage that reads one of its parameters; ()
    without a pipeline. gathering: when parameters are whole. input_cuts: how batch keys are split over axes. data: what a strategy needs
    again in `apply` (JSON values under its own name). notes: automatic choices, for the reader. ops: provider of each op.
    touched: (phase, strategy, full names) for each strategy that changed a layout, kept by `make_plan`.
    """

    config: TrainConfig
    mesh: MeshLayout
    batch: BatchPlan
    layouts: Mapping[str, ParameterLayout]
    program: Program
    gathering: Gathering = Gathering()
    input_cuts: tuple[InputCut, ...] = ()
    block_names: tuple[str, ...] = ()
    decisions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    applied: tuple[tuple[str, str], ...] = ()
    ops: Mapping[str, str] = field(default_factory=dict)
    stage_units: tuple[tuple[str, ...], ...] = ()

    def with_layouts(self, changed: Mapping[str, ParameterLayout]) -> PlanDraft:
        assert set(changed) <= set(self.layouts), sorted(set(changed) - set(self.layouts))
        return replace(self, layouts={**self.layouts, **changed})

    def with_decisions(self, kind: str, decisions: Mapping[str, str]) -> PlanDraft:
        return replace(self, decisions={**self.decisions, kind: dict(decisions)})

    def with_data(self, strategy: str, data: Mapping[str, object]) -> PlanDraft:
        return replace(self, data={**self.data, strategy: dict(data)})

    def with_op(self, op: str, provider: str) -> PlanDraft:
        return replace(self, ops={**self.ops, op: provider})

    def with_note(self, note: str) -> PlanDraft:
        return replace(self, notes=(*self.notes, note))

    def with_program(self, program: Program) -> PlanDraft:
        return replace(self, program=program)

    def with_stage_units(self, stage_units: tuple[tuple[str, ...], ...]) -> PlanDraft:
        """The program, which is set before, says which rank holds which stage."""
        assert len(stage_units) == self.program.num_stages, f"{len(stage_units)} stages for {self.program.stage_ranks}"
        return replace(self, stage_units=stage_units)

    def with_gathering(self, gathering: Gathering) -> PlanDraft:
        return replace(self, gathering=gathering)

    def with_mesh(self, mesh: MeshLayout) -> PlanDraft:
        return replace(self, mesh=mesh)


@dataclass(frozen=True)
class Plan(PlanDraft):
    """A finished plan. model_class: the model's class, for the reader."""

    model_class: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of everything that ranks must agree on."""
        agreed = {
            "mesh": asdict(self.mesh),
            "batch": asdict(self.batch),
            "layouts": [asdict(layout) for layout in self.layouts.values()],
            "inputs": [asdict(cut) for cut in self.input_cuts],
            "program": [[str(action) for action in actions] for actions in self.program.actions],
            "stages": [self.program.stage_ranks, self.stage_units],
            "decisions": self.decisions,
            "gathering": asdict(self.gathering),
            "data": self.data,
            "applied": self.applied,
            "ops": self.ops,
            "config": self.config.model_dump(mode="json", exclude={"checkpoint"}),
        }
        return hashlib.sha256(json.dumps(agreed, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @cached_property
    def units(self) -> tuple[str, ...]:
        """Names of all units of gather and reduce (blocks, and modules outside every block), in the order of their first parameter."""
        return tuple(dict.fromkeys(layout.block for layout in self.layouts.values()))

    @cached_property
    def units_by_use(self) -> tuple[str, ...]:
        """All units in the order in which a forward pass asks for them: those outside every block at its start, then the blocks."""
        return (*(unit for unit in self.units if unit not in self.block_names), *self.block_names)

    def describe(self) -> str:
        """The plan as text: one line a fact, stable from run to run."""
        axes = (
            ", ".join(f"{axis} {self.mesh.size(axis)}" for axis in BASE_AXES if self.mesh.size(axis) > 1)
            or "one process"
        )
        total = sum(layout.numel for layout in self.layouts.values())
        trained = sum(layout.numel for layout in self.layouts.values() if layout.trainable)
        tied = sum(1 for layout in self.layouts.values() if layout.aliases)
        lines = [
            f"plan {self.fingerprint}",
            f"model       {self.model_class}: {total:,} parameters, {trained:,} trained, {tied} tied, {len(self.block_names)} blocks",
            f"mesh        {axes} ({self.mesh.world_size} ranks)",
            f"batch       {self.batch.global_size} sequences a step: {self.batch.share} a rank in "
            f"{self.batch.num_microbatches} microbatches of {self.batch.micro_size}",
            f"precision   {self.config.precision}",
            f"order       {' -> '.join(f'{name} ({phase})' for phase, name in self.applied) or 'nothing to apply'}",
            f"ops         {'; '.join(self._op_texts())}",
        ]
        for kind, decisions in self.decisions.items():
            counts = {value: list(decisions.values()).count(value) for value in dict.fromkeys(decisions.values())}
            lines.append(f"{kind:<11} " + ", ".join(f"{value}: {count} blocks" for value, count in counts.items()))
        if self.stage_units:
            lines.append(f"pipeline    {'; '.join(self._stage_texts())}")
        lines += [f"layout      {line}" for line in self._layout_lines()]
        lines += [f"note        {note}" for note in self.notes]
        return "\n".join(lines)

    def _op_texts(self) -> Iterable[str]:
        """What is not the reference, by provider."""
        by_provider: dict[str, list[str]] = {}
        for op, provider in self.ops.items():
            by_provider.setdefault(provider, []).append(op)
        rest = by_provider.pop(REFERENCE, [])
        texts = [f"{provider}: {', '.join(names)}" for provider, names in by_provider.items()]
        return [*texts, *(["others reference" if texts else "all reference"] if rest else [])]

    def _stage_texts(self) -> Iterable[str]:
        for stage, (rank, units) in enumerate(zip(self.program.stage_ranks, self.stage_units, strict=True)):
            here = dict.fromkeys(self.mesh.axis_names, 0) | {"pp": rank}
            held = (layout for layout in self.layouts.values() if layout.block in units)
            elements = sum(layout.numel for layout in held if layout.compute.is_present(here))
            yield f"stage {stage} on rank {rank}: {len(units)} units, {elements:,} elements"

    def _layout_lines(self) -> Iterable[str]:
        kinds: dict[str, tuple[int, int]] = {}
        for layout in self.layouts.values():
            text = f"compute {_placement_text(layout.compute)}; state {_placement_text(layout.state)}"
            if layout.reduce_axes:
                text += f"; reduced in backward over {' x '.join(layout.reduce_axes)}"
            if layout.state.partial:
                text += f"; summed once a step over {' x '.join(layout.state.partial)}"
            count, numel = kinds.get(text, (0, 0))
            kinds[text] = (count + 1, numel + layout.numel)
        for text, (count, numel) in kinds.items():
            yield f"{count} parameters, {numel:,} elements: {text}"


def _placement_text(placement: Placement) -> str:
    cuts = [f"dim {cut.dim} over {' x '.join(cut.axes)}" for cut in placement.cuts]
    if placement.flat is not None:
        cuts.append(f"flat over {' x '.join(placement.flat.axes)}")
    text = " and ".join(cuts) or "whole"
    for axis, held in placement.present:
        text += f" on {axis} {', '.join(str(index) for index in held)}"
    return text


def make_plan(
    config: TrainConfig,
    anatomy: ModelAnatomy,
    strategies: Sequence[Strategy],
    axis_sizes: Mapping[str, int],
    ops: OpTable,
    *,
    world_size: int,
    known_problems: Sequence[Problem] = (),
) -> Plan:
    """Checks everything and decides everything.

    strategies: the active ones, in the order of application. axis_sizes: sizes that sections ask for; dp_shard takes what is left over.
    known_problems: what the caller found already, to be reported together with the rest.

    Raises: ConfigError with every problem of every strategy at once.
    """
    mesh, mesh_problems = _mesh(axis_sizes, world_size)
    problems = [*known_problems, *mesh_problems]
    batch, batch_problems = _batch(config, mesh)
    problems += batch_problems
    for strategy in strategies:
        problems += strategy.check(config, anatomy, mesh)
    problems += core_problems(config, anatomy, strategies, mesh)
    raise_problems(problems)
    draft = PlanDraft(
        config=config,
        mesh=mesh,
        batch=batch,
        layouts=initial_layouts(anatomy, mesh),
        program=plain_program(batch.num_microbatches),
        block_names=anatomy.blocks,
        ops=ops.providers(),
    )
    touched: dict[tuple[Phase, str], tuple[str, frozenset[str], tuple[str, ...]]] = {}
    for strategy in strategies:
        changed = strategy.plan(draft, anatomy)
        names = frozenset(name for name, layout in changed.layouts.items() if layout != draft.layouts[name])
        problems += conflicts(strategy, names, touched)
        touched[(strategy.phase, strategy.name)] = (strategy.name, names, strategy.after)
        draft = replace(changed, applied=(*draft.applied, (strategy.phase.name.lower(), strategy.name)))
    problems += [*layout_problems(draft), *program_problems(draft)]
    raise_problems(problems)
    draft = plan_model_ops(draft, anatomy, ops)
    return Plan(
        **{name: getattr(draft, name) for name in PlanDraft.__dataclass_fields__},
        model_class=anatomy.class_name,
    )


def initial_layouts(anatomy: ModelAnatomy, mesh: MeshLayout) -> dict[str, ParameterLayout]:
    """Every parameter whole on every rank; its gradient a summand over the data axes, to be summed once a step."""
    copies = tuple(axis for axis in BASE_AXES if mesh.size(axis) > 1)
    partial = tuple(axis for axis in LOSS_AXES if mesh.size(axis) > 1)
    layouts = {}
    for fact in anatomy.parameters:
        placement = Placement(fact.shape, replicated=copies, partial=partial if fact.trainable else ())
        unit = fact.block or fact.full_name.rpartition(".")[0]
        layouts[fact.full_name] = ParameterLayout(
            fact.full_name,
            fact.shape,
            placement,
            placement,
            aliases=fact.names[1:],
            block=unit,
            trainable=fact.trainable,
        )
    return layouts


def mesh_of(axis_sizes: Mapping[str, int], world_size: int) -> MeshLayout:
    """The mesh that a config asks for. Raises ConfigError when the ranks do not divide."""
    mesh, problems = _mesh(axis_sizes, world_size)
    raise_problems(problems)
    return mesh


def _mesh(axis_sizes: Mapping[str, int], world_size: int) -> tuple[MeshLayout, list[Problem]]:
    asked = math.prod(axis_sizes.values())
    if world_size % asked:
        named = " x ".join(f"{axis} {size}" for axis, size in axis_sizes.items() if size > 1)
        reason = f"the sizes asked for need a multiple of {asked} ranks ({named}), and there are {world_size}"
        return MeshLayout(), [Problem("parallel", reason, f"start {asked} ranks or change the sizes")]
    sizes = {**axis_sizes, "dp_shard": world_size // asked}
    pp, replicate, shard, context, tensor = (sizes.get(axis, 1) for axis in BASE_AXES)
    return MeshLayout((pp, replicate, shard, context, tensor)), []


def _batch(config: TrainConfig, mesh: MeshLayout) -> tuple[BatchPlan, list[Problem]]:
    data_size = mesh.size(DATA_AXES)
    size = config.batch.global_size
    share = max(size // data_size, 1)
    micro = config.batch.micro_size or share
    plan = BatchPlan(size, share, micro, max(share // micro, 1))
    if size % data_size:
        reason = f"is not divided by the {data_size} data-parallel ranks"
        lower, upper = size // data_size * data_size, -(-size // data_size) * data_size
        remedy = f"use {upper}" if lower == 0 else f"use {lower} or {upper}"
        return plan, [Problem("batch.global_size", reason, remedy, size)]
    if micro > share or share % micro:
        reason = f"does not divide the {share} sequences of one rank ({size} over {data_size} data-parallel ranks)"
        fitting = ", ".join(str(divisor) for divisor in range(1, share + 1) if share % divisor == 0)
        return plan, [Problem("batch.micro_size", reason, f"use one of {fitting}", micro)]
    return plan, []


def check_fingerprints(found: Sequence[bytes], own: str) -> None:
    """Raises ConfigError when ranks made different plans. found: every rank's fingerprint, in rank order."""
    different = sorted({rank for rank, fingerprint in enumerate(found) if fingerprint.decode() != own})
    if different:
        reason = f"ranks {different} made another plan than this one ({own})"
        remedy = "give every rank the same config, packages and versions"
        raise ConfigError([Problem("plan", reason, remedy)])
