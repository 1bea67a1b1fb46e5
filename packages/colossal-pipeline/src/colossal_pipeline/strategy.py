"""Pipeline parallelism as a strategy: where the model is cut and in which order it runs is decided while planning, then carried out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_core.errors import ConfigError, Problem
from colossal_core.strategy import Phase, StrategySpec
from colossal_pipeline.config import PipelineConfig, file_of_step
from colossal_pipeline.cutting import NAME, Cutting, balanced_starts, block_costs, cut, read, stream_width, written
from colossal_pipeline.layouts import AXIS, staged_layouts

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.config import TrainConfig
    from colossal_core.estimate import EstimateTable, HardwareProfile
    from colossal_core.flow import Flow
    from colossal_core.mesh import MeshLayout
    from colossal_core.plan import Plan, PlanDraft
    from colossal_core.program import Program
    from colossal_core.strategy import ApplyContext


class PipelineStrategy:
    """Stages over `pp`, run in the order of a schedule."""

    name = NAME
    axes = (AXIS,)
    phase = Phase.SPLIT
    after: tuple[str, ...] = ()

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config

    def check(self, config: TrainConfig, anatomy: ModelAnatomy, mesh: MeshLayout) -> list[Problem]:
        from colossal_pipeline.choice import schedule_problems

        problems = list(schedule_problems(self.config, _num_microbatches(config, mesh)))
        problems += self._model_problems(anatomy)
        recorded, last = self.config.record_step, config.train.num_steps
        if recorded is not None and recorded > last:
            reason, remedy = f"the run ends after step {last}", f"record one of the steps 1 to {last}"
            problems.append(Problem("parallel.pipeline.record_step", reason, remedy, recorded))
        if recorded is not None and isinstance(self.config.blocks, str):
            written_to = Path(config.checkpoint.directory) / file_of_step(recorded)
            if written_to.resolve() == Path(self.config.blocks).resolve():
                reason = "would be written over the file that parallel.pipeline.blocks is read from"
                remedy = "record another step, or copy the file"
                problems.append(Problem("parallel.pipeline.record_step", reason, remedy, recorded))
        if problems:
            return problems
        return list(self._proof_problems(anatomy))

    def _model_problems(self, anatomy: ModelAnatomy) -> Iterable[Problem]:
        from colossal_pipeline.choice import num_chunks

        if anatomy.flow is None:
            why = anatomy.unfollowed or "no forward pass was seen"
            reason = f"needs to know what flows between the blocks of {anatomy.class_name}: {why}"
            yield Problem("parallel.pipeline", reason, "give model.example_batch, or use size: 1")
            return
        count, stages = len(anatomy.flow.blocks), self.config.size * num_chunks(self.config)
        if count < stages:
            reason = f"makes {stages} stages, and {anatomy.class_name} runs {count} blocks"
            yield Problem("parallel.pipeline.size", reason, f"use at most {count} stages", self.config.size)
        given = self.config.blocks
        if isinstance(given, str):
            yield from _recorded_problems(given, count)
        elif given is not None and (len(given) != stages or sum(given) != count):
            reason = (
                f"names {sum(given)} blocks in {len(given)} stages, and there are {count} blocks and {stages} stages"
            )
            yield Problem("parallel.pipeline.blocks", reason, f"give {stages} numbers that add up to {count}", given)

    def _proof_problems(self, anatomy: ModelAnatomy) -> Iterable[Problem]:
        from colossal_core.specimen import SpecimenError
        from colossal_pipeline.proof import prove

        if anatomy.specimen is None:
            reason = "needs a small model of this kind to prove that stages compute what the whole does"
            yield Problem("parallel.pipeline", reason, "give model.example_batch, or use size: 1")
            return
        try:
            different = prove(anatomy.specimen)
        except SpecimenError as error:
            reason = f"needs a small model of this kind to prove that stages compute what the whole does: {error}"
            yield Problem(
                "parallel.pipeline", reason, "give model.verify_config and model.example_batch, or use size: 1"
            )
            return
        if different:
            reason = f"{anatomy.class_name} cut into stages does not compute what the whole does: {different}"
            yield Problem("parallel.pipeline", reason, "use size: 1 for this model")

    def plan(self, draft: PlanDraft, anatomy: ModelAnatomy) -> PlanDraft:
        from colossal_pipeline.choice import make_program

        assert anatomy.flow is not None
        program = make_program(self.config, draft.batch.num_microbatches)
        cutting = cut(anatomy.flow, self._starts(anatomy, anatomy.flow, program.num_stages))
        cutting = replace(cutting, width=stream_width(anatomy))
        staged = staged_layouts(draft.layouts, anatomy.flow, cutting, program.stage_ranks, draft.mesh)
        draft = draft.with_program(program).with_stage_units(staged.stage_units)
        draft = draft.with_mesh(staged.mesh).with_layouts(staged.layouts).with_data(self.name, written(cutting))
        if (early := self._early_step()) is not None:
            draft = draft.with_note(early)
        return draft.with_note(f"pipeline: {self._summary(program, cutting)}")

    def _early_step(self) -> str | None:
        """What is said where stages are cut by a step in which kernels were loaded and messages went through host memory."""
        from colossal_core.stage_links import FIRST_STEPS
        from colossal_pipeline.trace import BLOCKS_FIELD, Trace

        given = self.config.blocks
        if not isinstance(given, str) or (step := Trace.read(Path(given), BLOCKS_FIELD).step) > FIRST_STEPS:
            return None
        return f"pipeline: {given} is step {step} of its run: stages take other times from step {FIRST_STEPS + 1} on"

    def _starts(self, anatomy: ModelAnatomy, flow: Flow, num_stages: int) -> tuple[int, ...]:
        from colossal_pipeline.trace import BLOCKS_FIELD, Trace, measured_costs

        given, costs = self.config.blocks, block_costs(anatomy, flow)
        if isinstance(given, str):
            costs = measured_costs(Trace.read(Path(given), BLOCKS_FIELD), costs)
        elif given is not None:
            return tuple(sum(given[:stage]) for stage in range(num_stages))
        return balanced_starts(costs, num_stages)

    def _summary(self, program: Program, cutting: Cutting) -> str:
        counts = " ".join(map(str, cutting.counts))
        most = max(len(crossing) for crossing in cutting.crossing)
        tensors = "one tensor crosses" if most == 1 else f"up to {most} tensors cross"
        return (
            f"{self.config.schedule}, {program.num_stages} stages of {counts} blocks on {len(program.actions)} ranks, "
            f"{tensors} between two stages"
        )

    def estimate(self, table: EstimateTable, profile: HardwareProfile) -> EstimateTable:
        from colossal_pipeline.cost import estimate_pipeline

        return estimate_pipeline(table, profile, self.config)

    def apply(self, model: nn.Module, plan: Plan, context: ApplyContext) -> None:
        from colossal_core.shadow import Shadow
        from colossal_pipeline.skeleton import Skeleton

        shadow = Shadow(model, context.precision.compute)
        context.stages = Skeleton(model, read(plan), shadow, context.device)
        if self.config.record_step is not None:
            from colossal_pipeline.recorder import record_step

            record_step(self.config, plan, context)

    def state(self) -> Mapping[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        del state


def _recorded_problems(path: str, num_blocks: int) -> Iterable[Problem]:
    from colossal_pipeline.trace import BLOCKS_FIELD, Trace

    try:
        recorded = Trace.read(Path(path), BLOCKS_FIELD).blocks
    except ConfigError as error:
        yield from error.problems
        return
    if sum(recorded) != num_blocks:
        reason = f"was recorded with {sum(recorded)} blocks, and this model runs {num_blocks}"
        yield Problem(BLOCKS_FIELD, reason, "record a step of this model, or leave it out", path)


def _num_microbatches(config: TrainConfig, mesh: MeshLayout) -> int:
    """Microbatches of a step on one rank, as core's plan counts them."""
    from colossal_core.mesh import DATA_AXES

    share = max(config.batch.global_size // mesh.size(DATA_AXES), 1)
    return max(share // (config.batch.micro_size or share), 1)


def pipeline_spec() -> StrategySpec:
    """How the plugin announces the strategy: active where a size above 1 is asked for."""
    return StrategySpec(
        NAME, "parallel.pipeline", PipelineConfig, _strategy, axis_sizes=_axis_sizes, show_schedule=_show_schedule
    )


def _show_schedule(plan: Plan, anatomy: ModelAnatomy, picture: Path | None) -> str:
    from colossal_pipeline.planned import show_schedule

    return show_schedule(plan, anatomy, picture)


def _strategy(config: PipelineConfig) -> PipelineStrategy | None:
    return PipelineStrategy(config) if config.size > 1 else None


def _axis_sizes(config: PipelineConfig) -> Mapping[str, int]:
    return {AXIS: config.size}
