"""The strategy `zero`: data parallelism. It owns the parameter state of every run in which this package is installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from colossal_core.errors import Problem
from colossal_core.plan import Gathering
from colossal_core.strategy import Phase, StrategySpec
from colossal_zero.config import ZeroConfig
from colossal_zero.cost import estimate_zero
from colossal_zero.plan import DEFAULT_BUCKET_BYTES, Bucket, buckets_of, replicated_layouts, sharded_layouts

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.config import TrainConfig
    from colossal_core.estimate import EstimateTable, HardwareProfile
    from colossal_core.layout import ParameterLayout
    from colossal_core.mesh import MeshLayout
    from colossal_core.plan import Plan, PlanDraft
    from colossal_core.strategy import ApplyContext

ELEMENT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 4, "fp16": 4}
"""Bytes of one gradient element as it is kept, by precision."""


class ZeroStrategy:
    """Stages 0 to 3 over `dp_shard x cp`, copied along `dp_replicate`."""

    name = "zero"
    axes = ("dp_replicate", "dp_shard", "cp")
    phase = Phase.SHARD_STATE
    after: tuple[str, ...] = ()

    def __init__(self, config: ZeroConfig) -> None:
        self.config = config

    def check(self, config: TrainConfig, anatomy: ModelAnatomy, mesh: MeshLayout) -> list[Problem]:
        del anatomy
        problems = []
        for key in ("keep_parameters", "prefetch"):
            value = getattr(self.config, key)
            if value is not None and self.config.stage < 3:
                reason = f"says how parameters are gathered, and stage {self.config.stage} keeps them whole"
                problems.append(Problem(f"parallel.zero.{key}", reason, "remove it, or use stage: 3", value))
        if self.config.keep_gradients is not None and self.config.stage < 2:
            reason = f"says when gradients are reduced, and stage {self.config.stage} adds them up whole in any case"
            remedy = "remove it, or use stage: 2 or 3"
            problems.append(Problem("parallel.zero.keep_gradients", reason, remedy, self.config.keep_gradients))
        keep = self.config.keep_parameters
        if self.config.stage == 3 and mesh.size("pp") > 1 and keep in ("use", "microbatch"):
            reason = (
                "a pipeline has several microbatches under way at once, which all need the parameters of their stage"
            )
            problems.append(Problem("parallel.zero.keep_parameters", reason, "remove it, or use step", keep))
        if self.config.reduce_dtype is not None and config.precision in ("fp64", "fp32"):
            reason = f"would round the gradients of a run in {config.precision}"
            remedy = "remove it, or use precision: bf16"
            problems.append(Problem("parallel.zero.reduce_dtype", reason, remedy, self.config.reduce_dtype))
        return problems

    def plan(self, draft: PlanDraft, anatomy: ModelAnatomy) -> PlanDraft:
        elements = self._bucket_elements(draft)
        whole_blocks = self.config.stage >= 2
        trained = [layout for layout in draft.layouts.values() if layout.trainable]
        assign = partial(
            buckets_of,
            blocks=draft.block_names,
            bucket_elements=elements,
            mesh=draft.mesh,
            stage_units=draft.stage_units,
        )
        buckets = assign(trained, whole_blocks=whole_blocks)
        if self.config.stage == 3:
            buckets += assign(_sharded_though_frozen(draft.layouts.values(), anatomy), whole_blocks=True)
            draft = draft.with_gathering(self._gathering(draft.mesh))
        changed = (
            sharded_layouts(draft.layouts, buckets, draft.mesh)
            if self.config.stage
            else replicated_layouts(draft.layouts)
        )
        draft = draft.with_layouts(changed).with_data(
            self.name, {"buckets": [list(bucket.names) for bucket in buckets]}
        )
        return draft.with_note(f"zero: stage {self.config.stage}, {len(buckets)} buckets{self._policy(draft.mesh)}")

    def _bucket_elements(self, draft: PlanDraft) -> int:
        """A bucket's size. Whole blocks arrive together where they are compiled: cutting them makes more messages, and none earlier."""
        element_bytes = ELEMENT_BYTES[draft.config.precision]
        if self.config.bucket_bytes is not None:
            return self.config.bucket_bytes // element_bytes
        blocks = dict.fromkeys(draft.block_names, 0)
        for layout in draft.layouts.values():
            if layout.trainable and layout.block in blocks:
                blocks[layout.block] += layout.numel
        return max(DEFAULT_BUCKET_BYTES // element_bytes, *blocks.values(), 1)

    def _gathering(self, mesh: MeshLayout) -> Gathering:
        prefetch = 1 if self.config.prefetch is None else self.config.prefetch
        return Gathering(self.config.keep_parameters or ("use" if mesh.size("pp") == 1 else "step"), prefetch)

    def _keeps_gradients(self, mesh: MeshLayout) -> str:
        if self.config.stage < 2:
            return "step"
        return self.config.keep_gradients or ("microbatch" if mesh.size("pp") == 1 else "step")

    def _policy(self, mesh: MeshLayout) -> str:
        sent = f", gradients sent in {self.config.reduce_dtype}" if self.config.reduce_dtype else ""
        if self.config.stage < 2:
            return sent
        if self._keeps_gradients(mesh) == "step":
            sent += ", gradients reduced once a step"
        if self.config.stage < 3:
            return sent
        gathering = self._gathering(mesh)
        return f"{sent}, parameters gathered for each {gathering.keep}, {gathering.prefetch} blocks ahead"

    def estimate(self, table: EstimateTable, profile: HardwareProfile) -> EstimateTable:
        return estimate_zero(table, profile, self.config)

    def apply(self, model: nn.Module, plan: Plan, context: ApplyContext) -> None:
        import torch

        from colossal_zero.flat_state import FlatState
        from colossal_zero.formats import Formats

        names = plan.data[self.name]["buckets"]
        assert isinstance(names, list)
        buckets = [Bucket(tuple(bucket)) for bucket in names]
        wire = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[self.config.reduce_dtype]
        whole = self._keeps_gradients(plan.mesh) == "step"
        formats = Formats.of(self.config.stage, context.precision, wire, whole_gradients=whole)
        stages = plan.program.stages_of(context.coordinate["pp"]) if plan.stage_units else ()
        context.parameters = FlatState(
            plan.layouts,
            buckets,
            context.slots,
            formats,
            context.collectives,
            plan.gathering,
            self._early(plan, context.coordinate),
            [plan.stage_units[stage] for stage in stages],
        )

    def _early(self, plan: Plan, coordinate: Mapping[str, int]) -> tuple[str, ...]:
        """Units to be gathered beside the optimizer. Under stage 3 what a step begins with: what is outside the blocks, and the first of
        this rank's.
        """
        held = {layout.block for layout in plan.layouts.values() if layout.compute.is_present(coordinate)}
        units = tuple(unit for unit in plan.units_by_use if unit in held)
        if self.config.stage < 3:
            return units
        outside = tuple(unit for unit in units if unit not in plan.block_names)
        return units[: len(outside) + 1]

    def state(self) -> Mapping[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        del state


def _sharded_though_frozen(layouts: Iterable[ParameterLayout], anatomy: ModelAnatomy) -> list[ParameterLayout]:
    """Frozen floating parameters: they are kept in the compute dtype. Others (quantized ones) stay whole."""
    floating = {fact.full_name for fact in anatomy.parameters if fact.dtype.startswith(("float", "bfloat"))}
    return [layout for layout in layouts if not layout.trainable and layout.full_name in floating]


def zero_spec() -> StrategySpec:
    """How the plugin announces the strategy: always active, since stage 0 is data parallelism itself."""
    return StrategySpec("zero", "parallel.zero", ZeroConfig, ZeroStrategy, axis_sizes=_axis_sizes)


def _axis_sizes(config: ZeroConfig) -> Mapping[str, int]:
    return {"dp_replicate": config.replicate}
