"""The strategy `zero`: data parallelism. It owns the parameter state of every run in which this package is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from colossal_core.errors import Problem
from colossal_core.strategy import Phase, StrategySpec
from colossal_zero.config import ZeroConfig
from colossal_zero.cost import estimate_zero
from colossal_zero.plan import Bucket, assign_buckets, replicated_layouts, sharded_layouts

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.config import TrainConfig
    from colossal_core.estimate import EstimateTable, HardwareProfile
    from colossal_core.mesh import MeshLayout
    from colossal_core.plan import Plan, PlanDraft
    from colossal_core.strategy import ApplyContext

LAST_STAGE = 1
MASTER_ELEMENT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 4, "fp16": 4}


class ZeroStrategy:
    """Stages 0 and 1 over `dp_shard x cp`, copied along `dp_replicate`."""

    name = "zero"
    axes = ("dp_replicate", "dp_shard", "cp")
    phase = Phase.SHARD_STATE
    after: tuple[str, ...] = ()

    def __init__(self, config: ZeroConfig) -> None:
        self.config = config

    def check(self, config: TrainConfig, anatomy: ModelAnatomy, mesh: MeshLayout) -> list[Problem]:
        if self.config.stage > LAST_STAGE:
            reason = "stages 2 and 3 are not part of this release of colossal-zero"
            return [Problem("parallel.zero.stage", reason, "use 0 or 1", self.config.stage)]
        return []

    def plan(self, draft: PlanDraft, anatomy: ModelAnatomy) -> PlanDraft:
        elements = self.config.bucket_bytes // MASTER_ELEMENT_BYTES[draft.config.precision]
        buckets = assign_buckets(draft.layouts, draft.block_names, elements)
        if self.config.stage == 0:
            changed = replicated_layouts(draft.layouts)
        else:
            changed = sharded_layouts(draft.layouts, buckets, draft.mesh)
        draft = draft.with_layouts(changed).with_data(
            self.name, {"buckets": [list(bucket.names) for bucket in buckets]}
        )
        return draft.with_note(f"zero: stage {self.config.stage}, {len(buckets)} buckets")

    def estimate(self, table: EstimateTable, profile: HardwareProfile) -> EstimateTable:
        return estimate_zero(table, profile)

    def apply(self, model: nn.Module, plan: Plan, context: ApplyContext) -> None:
        from colossal_zero.flat_state import FlatState

        names = plan.data[self.name]["buckets"]
        assert isinstance(names, list)
        buckets = [Bucket(tuple(bucket)) for bucket in names]
        sharded = self.config.stage >= 1
        context.parameters = FlatState(
            plan.layouts, buckets, context.slots, context.precision, context.collectives, sharded=sharded
        )

    def state(self) -> Mapping[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        del state


def zero_spec() -> StrategySpec:
    """How the plugin announces the strategy: always active, since stage 0 is data parallelism itself."""
    return StrategySpec("zero", "parallel.zero", ZeroConfig, ZeroStrategy, axis_sizes=_axis_sizes)


def _axis_sizes(config: ZeroConfig) -> Mapping[str, int]:
    return {"dp_replicate": config.replicate}
