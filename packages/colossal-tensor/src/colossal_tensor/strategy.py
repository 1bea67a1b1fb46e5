"""Tensor and sequence parallelism as a strategy: what is cut is found and proven while planning, then carried out on the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from colossal_core.errors import ConfigError, Problem
from colossal_core.specimen import SpecimenError
from colossal_core.strategy import Phase, StrategySpec
from colossal_tensor.config import TensorConfig
from colossal_tensor.decided import NAME, decide, read, written
from colossal_tensor.group import TensorPlan
from colossal_tensor.layouts import AXIS, Cutting, Laid, tensor_layouts

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.config import TrainConfig
    from colossal_core.estimate import EstimateTable, HardwareProfile
    from colossal_core.mesh import MeshLayout
    from colossal_core.plan import Plan, PlanDraft
    from colossal_core.strategy import ApplyContext
    from colossal_tensor.cross_entropy import VocabularyCrossEntropy


class TensorStrategy:
    """1-D tensor parallelism over `tp`, with or without sequence parallelism."""

    name = NAME
    axes = (AXIS,)
    phase = Phase.SHARD_COMPUTE
    after: tuple[str, ...] = ()

    def __init__(self, config: TensorConfig) -> None:
        self.config = config

    def check(self, config: TrainConfig, anatomy: ModelAnatomy, mesh: MeshLayout) -> list[Problem]:
        if self.config.mode != "1d":
            reason = "is not there yet: only matrices cut in one dimension are"
            return [Problem("parallel.tensor.mode", reason, "use 1d", self.config.mode)]
        try:
            plan = self._found(anatomy, config)
        except ConfigError as error:
            return list(error.problems)
        except SpecimenError as error:
            reason = f"needs a small model of this kind to prove what it cuts: {error}"
            return [
                Problem("parallel.tensor", reason, "give model.verify_config and model.example_batch, or use size: 1")
            ]
        problems = [*self._laid(plan, anatomy, mesh).problems, *self._sequence_problems(plan, config)]
        if not plan.groups:
            problems.append(self._nothing_cut(anatomy, plan))
        return problems

    def _nothing_cut(self, anatomy: ModelAnatomy, plan: TensorPlan) -> Problem:
        ruled = bool(self.config.rules)
        why = "; ".join(plan.notes) or ("the rules leave every one whole" if ruled else "it has none in a block")
        remedy = f"give {'other ' if ruled else ''}parallel.tensor.rules, or use size: 1"
        return Problem("parallel.tensor", f"no matrix of {anatomy.class_name} could be cut: {why}", remedy)

    def _sequence_problems(self, plan: TensorPlan, config: TrainConfig) -> Iterable[Problem]:
        if self.config.sequence_parallel and plan.stream is None:
            reason = "is not the same as one process for this model"
            yield Problem("parallel.tensor.sequence_parallel", reason, "remove it, or set it to false", True)
        length = config.data.sequence_length if config.data is not None else None
        if plan.stream is not None and length is not None and length % self.config.size:
            reason = f"is not divided by parallel.tensor.size={self.config.size}, over which the sequence is cut"
            near = length // self.config.size * self.config.size
            remedy = f"use {near or self.config.size} or set parallel.tensor.sequence_parallel: false"
            yield Problem("data.sequence_length", reason, remedy, length)

    def _found(self, anatomy: ModelAnatomy, config: TrainConfig) -> TensorPlan:
        from colossal_tensor.search.find import find_plan

        length = config.data.sequence_length if config.data is not None else 0
        if self.config.sequence_parallel is None and length % self.config.size:
            plan = find_plan(anatomy, self.config.model_copy(update={"sequence_parallel": False}))
            note = f"the sequence is not cut between groups: data.sequence_length={length} is not divided by {self.config.size}"
            return replace(plan, notes=(*plan.notes, note))
        return find_plan(anatomy, self.config)

    @staticmethod
    def _laid(plan: TensorPlan, anatomy: ModelAnatomy, mesh: MeshLayout) -> Laid:
        from colossal_core.plan import initial_layouts

        return tensor_layouts(plan, anatomy, initial_layouts(anatomy, mesh), mesh)

    def plan(self, draft: PlanDraft, anatomy: ModelAnatomy) -> PlanDraft:
        plan = self._found(anatomy, draft.config)
        laid = tensor_layouts(plan, anatomy, draft.layouts, draft.mesh)
        data = written(decide(plan, laid.cutting, anatomy))
        draft = draft.with_mesh(laid.mesh).with_layouts(laid.layouts).with_data(self.name, data)
        for note in (self._summary(laid, plan), *plan.notes):
            draft = draft.with_note(f"tensor: {note}")
        return draft

    def _summary(self, laid: Laid, plan: TensorPlan) -> str:
        cut = [layout for layout in laid.layouts.values() if layout.compute.cut_axes]
        share = sum(layout.numel for layout in cut) / max(sum(layout.numel for layout in laid.layouts.values()), 1)
        between = "sequence cut between them" if plan.stream is not None else "activations whole between them"
        vocabulary = "vocabulary cut" if laid.cutting.words else "vocabulary whole"
        sources = list(plan.source.values())
        found = ", ".join(f"{source} {sources.count(source)}" for source in dict.fromkeys(sources))
        return (
            f"{len(laid.cutting.placed)} groups over {self.config.size} ranks (kinds by source: {found}), "
            f"{share:.1%} of the parameters cut, {vocabulary}, {between}"
        )

    def estimate(self, table: EstimateTable, profile: HardwareProfile) -> EstimateTable:
        from colossal_tensor.cost import estimate_tensor

        return estimate_tensor(table, profile, self.config)

    def apply(self, model: nn.Module, plan: Plan, context: ApplyContext) -> None:
        from colossal_tensor.dropout import install_dropout
        from colossal_tensor.regions import install
        from colossal_tensor.vocabulary import install_whole_logits

        decided = read(plan)
        symmetric = self.config.overlap == "auto"
        install(model, decided.plan, decided.cutting, context.collectives, symmetric=symmetric)
        install_dropout(model, decided.plan, decided.cutting, context.collectives, plan.block_names, context.dropout)
        vocabulary = decided.plan.vocabulary
        if vocabulary.head and not vocabulary.gathered:
            loss = self._loss(decided.cutting, context, plan)
            install_whole_logits(model, vocabulary.head, decided.cutting, context.collectives, unless=loss.readings)
            context.cross_entropy = loss

    @staticmethod
    def _loss(cutting: Cutting, context: ApplyContext, plan: Plan) -> VocabularyCrossEntropy:
        """Of split logits: by the op table's kernels; without them compiled where blocks are."""
        from colossal_tensor.cross_entropy import Words, vocabulary_cross_entropy

        start, stop = cutting.words[context.collectives.index(AXIS)]
        words = Words(start, stop, cutting.words[-1][1])
        loss = vocabulary_cross_entropy(context.collectives, AXIS, words, context.ops)
        compiling = plan.config.compile
        return loss.compiled(compiling.backend, dynamic=compiling.dynamic) if compiling.enabled else loss

    def state(self) -> Mapping[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        del state


def tensor_spec() -> StrategySpec:
    """How the plugin announces the strategy: active where a size above 1 is asked for."""
    return StrategySpec("tensor", "parallel.tensor", TensorConfig, _strategy, axis_sizes=_axis_sizes)


def _strategy(config: TensorConfig) -> TensorStrategy | None:
    return TensorStrategy(config) if config.size > 1 else None


def _axis_sizes(config: TensorConfig) -> Mapping[str, int]:
    return {AXIS: config.size}
