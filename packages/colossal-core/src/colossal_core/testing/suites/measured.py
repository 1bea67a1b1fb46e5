"""A strategy's estimate for one plan, to be laid beside what the run really keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from colossal_core.estimate import EstimateTable, HardwareProfile, ModelSize
from colossal_core.mesh import BASE_AXES
from colossal_core.precision import precision

if TYPE_CHECKING:
    from colossal_core.plan import Plan
    from colossal_core.strategy import Strategy

STATE_COLUMNS = ("parameter_bytes", "master_bytes", "optimizer_bytes")


def estimated_bytes(strategy: Strategy, plan: Plan) -> Mapping[str, float]:
    """The state bytes that a strategy adds to an empty table whose one row is `plan`."""
    trained = sum(layout.numel for layout in plan.layouts.values() if layout.trainable)
    in_blocks = sum(layout.numel for layout in plan.layouts.values() if layout.block in plan.block_names)
    model = ModelSize(
        num_parameters=sum(layout.numel for layout in plan.layouts.values()),
        num_trainable=trained,
        num_blocks=len(plan.block_names),
        block_parameters=in_blocks // max(len(plan.block_names), 1),
        hidden_size=1,
        sequence_length=1,
        vocab_size=1,
        num_heads=1,
    )
    sharded = any(layout.state.flat is not None for layout in plan.layouts.values())
    inputs = {axis: np.array([float(plan.mesh.size(axis))]) for axis in BASE_AXES}
    inputs |= {
        "zero_stage": np.array([1.0 if sharded else 0.0]),
        "micro_size": np.array([float(plan.batch.micro_size)]),
        "num_microbatches": np.array([float(plan.batch.num_microbatches)]),
        "recompute": np.array([0.0]),
    }
    kinds = precision(plan.config.precision)
    profile = HardwareProfile(
        "any", 1.0, 1.0, 1.0, 1.0, 0.0,
        compute_element_bytes=kinds.compute.itemsize, master_element_bytes=kinds.master.itemsize,
    )  # fmt: skip
    found = strategy.estimate(EstimateTable(model, inputs), profile)
    return {column: float(found.column(column)[0]) for column in STATE_COLUMNS}
