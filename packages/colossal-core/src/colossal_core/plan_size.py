"""The sizes that closed forms of cost read, of a plan: what its fullest rank holds, and how long the sequences of a batch are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from colossal_core.estimate import ModelSize

if TYPE_CHECKING:
    import torch

    from colossal_core.plan import Plan


def model_size(plan: Plan, state_bytes: float | None) -> ModelSize:
    """The model's numbers on the fullest rank of a plan: local elements, padding and copies included, of the compute placements.

    Those that only formulas of activations read are 0: activations are traced. state_bytes: of optimizer state for each trained element;
    None: AdamW's in the master format.
    """
    layouts, local = tuple(plan.layouts.values()), _fullest(plan)
    blocks = dict.fromkeys(plan.block_names, 0)
    for layout in layouts:
        if layout.block in blocks:
            blocks[layout.block] += local[layout.full_name]
    return ModelSize(
        num_parameters=sum(local.values()),
        num_trainable=sum(local[layout.full_name] for layout in layouts if layout.trainable),
        num_blocks=len(blocks),
        block_parameters=max(blocks.values(), default=0),
        hidden_size=0,
        sequence_length=0,
        vocab_size=0,
        num_heads=0,
        optimizer_state_bytes=state_bytes,
        in_blocks=sum(blocks.values()),
        largest_parameter=max((local[layout.full_name] for layout in layouts if layout.trainable), default=0),
    )


def _fullest(plan: Plan) -> dict[str, int]:
    """Elements of every parameter's compute copy on the rank that has most. Ranks of the data axes have the same."""
    mesh, found = plan.mesh, dict[str, int]()
    for rank in mesh.group(0, ("pp", "tp")):
        coordinate = mesh.coordinate(rank)
        local = {name: math.prod(layout.compute.local_shape(coordinate, mesh)) for name, layout in plan.layouts.items()}
        if not found or sum(local.values()) > sum(found.values()):
            found = local
    return found


def positions_in(batch: Mapping[str, torch.Tensor] | None) -> int:
    """Positions of one sequence of token ids or labels in a batch; 0 where there is none."""
    for tensor in ({} if batch is None else batch).values():
        if tensor.ndim == 2 and not tensor.is_floating_point():
            return tensor.shape[1]
    return 0
