"""Statistics of the reduced gradients, unit by unit: what a run reports on request, and asks when a step is not finite.

Read from the shards as the step leaves them: after reduction and unscaling, before clipping, each element once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from colossal_core.mesh import WORLD

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.plan import Plan
    from colossal_core.shards import ParameterState

ALL_UNITS = "*"
"""The name under which the statistics of all gradients together stand: no module can have it."""

# Gradients are read in parts of this many elements, so that what is made beside them stays at 64 MiB in float32.
PART_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class GradientStatistics:
    """Of one unit, or of all: 0-d tensors, the same on every rank; reading one waits for the device.

    norm: L2 norm. max_abs: largest magnitude. zero_fraction: share of elements that are zero, float64. non_finite: number of elements that
    are NaN or infinite, int64; norm and max_abs are then not finite either.
    """

    norm: torch.Tensor
    max_abs: torch.Tensor
    zero_fraction: torch.Tensor
    non_finite: torch.Tensor


def gradient_statistics(
    state: ParameterState, plan: Plan, collectives: Collectives, dtype: torch.dtype
) -> dict[str, GradientStatistics]:
    """Statistics by unit (block, or module outside every block) that has trained parameters, in the plan's order, and under `ALL_UNITS`.

    dtype: in which norms are taken. Communication: one all-reduce (sum) of 24 bytes and one (max) of 8 bytes a unit, over all ranks.
    A number that is not finite is counted by the sum, which no backend can drop it from. No synchronisation with the host.
    """
    numels: dict[str, int] = {}
    for layout in plan.layouts.values():
        if layout.trainable:
            numels[layout.block] = numels.get(layout.block, 0) + layout.numel
    place = {unit: row for row, unit in enumerate(numels)}
    coordinate = collectives.mesh.coordinate(collectives.rank)
    sums = torch.zeros(len(place), 3, dtype=torch.float64, device=collectives.device)
    largest = torch.zeros(len(place), dtype=torch.float64, device=collectives.device)
    for shard in state.shards.values():
        if shard.layout.trainable and shard.layout.state.owns(coordinate) and shard.gradient is not None:
            row = place[shard.layout.block]
            for part in torch.split(shard.gradient.detach().reshape(-1), PART_ELEMENTS):
                if part.numel():
                    added, magnitude = _of_part(part, dtype)
                    sums[row] += added.to(sums.device)
                    largest[row] = torch.maximum(largest[row], magnitude.to(sums.device))
    handles = [
        collectives.start_all_reduce(sums, WORLD, tag="gradient statistics"),
        collectives.start_all_reduce(largest, WORLD, op="max", tag="gradient statistics"),
    ]
    for handle in handles:
        handle.wait()
    found = {unit: _statistics(sums[row], largest[row], numels[unit], dtype) for unit, row in place.items()}
    found[ALL_UNITS] = _statistics(sums.sum(dim=0), largest.amax(), sum(numels.values()), dtype)
    return found


def units_not_finite(statistics: Mapping[str, GradientStatistics]) -> tuple[str, ...]:
    """The units with an element that is not finite, in order. Waits for the device."""
    counts = torch.stack([found.non_finite for found in statistics.values()]).tolist()
    return tuple(unit for unit, count in zip(statistics, counts, strict=True) if count and unit != ALL_UNITS)


def _of_part(part: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(square of the norm, elements that are not zero, elements that are not finite) [3], and the largest magnitude 0-d; all float64."""
    added = torch.stack(
        [
            torch.linalg.vector_norm(part, dtype=dtype).double().square(),
            torch.linalg.vector_norm(part, 0, dtype=torch.float64),
            (~part.isfinite()).sum(dtype=torch.float64),
        ]
    )
    return added, torch.linalg.vector_norm(part, torch.inf).double()


def _statistics(sums: torch.Tensor, largest: torch.Tensor, numel: int, dtype: torch.dtype) -> GradientStatistics:
    """Zeros are counted as what is not non-zero, so that padding, which is zero and in no piece, is none of them."""
    square, non_zero, non_finite = sums.unbind()
    return GradientStatistics(
        norm=square.sqrt().to(dtype),
        max_abs=largest.to(dtype),
        zero_fraction=(numel - non_zero) / numel,
        non_finite=non_finite.to(torch.int64),
    )
