"""Full tensors out of shards, by layout alone: for reading one parameter or gradient, for verify and for export. Never for a save."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from colossal_core.layout import Placement, fill_full
from colossal_core.mesh import WORLD

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives


def gather_full(local: torch.Tensor, placement: Placement, collectives: Collectives) -> torch.Tensor:
    """The full tensor on every rank, padding left out. All ranks call it together.

    Communication: an all-gather over the axes along which the placement is cut (over all ranks where only some hold it), of the largest
    local size.
    """
    mesh = collectives.mesh
    axes = tuple(axis for axis in dict.fromkeys(placement.cut_axes) if mesh.size(axis) > 1)
    if placement.present:
        axes = WORLD
    full = torch.zeros(placement.shape, dtype=local.dtype, device=local.device)
    members = [mesh.coordinate(rank) for rank in mesh.group(collectives.rank, axes)] if axes else []
    if not axes:
        fill_full(full, local, placement.pieces(mesh.coordinate(collectives.rank), mesh))
        return full
    sizes = [torch.Size(placement.local_shape(member, mesh)).numel() for member in members]
    step = max(max(sizes), 1)
    sent = torch.zeros(step, dtype=local.dtype, device=local.device)
    sent[: local.numel()] = local.reshape(-1)
    received = torch.empty(step * len(members), dtype=local.dtype, device=local.device)
    collectives.start_all_gather(received, sent, axes, tag="full tensor").wait()
    for index, member in enumerate(members):
        fill_full(full, received[index * step : (index + 1) * step], placement.pieces(member, mesh))
    return full
