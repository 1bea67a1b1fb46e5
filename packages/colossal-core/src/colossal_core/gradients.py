"""Finishing the gradients, once a step, for every strategy: sums that are still open, the norm, and the clip factor.

Everything here works on shards and on layouts alone; no strategy reduces privately.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from colossal_core.mesh import WORLD

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.shards import ParameterState, Shard


def sum_on_shards(state: ParameterState, collectives: Collectives) -> None:
    """Sums every gradient over the axes on which its state placement is still partial.

    Communication: one coalesced all-reduce for each set of axes, of the bytes of the shards' gradients. Pipeline stages hold different
    parameters: groups that overlap are asked in one order everywhere, that of the names of their axes.
    """
    by_axes: defaultdict[tuple[str, ...], list[torch.Tensor]] = defaultdict(list)
    for shard in _trained(state):
        if shard.layout.state.partial:
            assert shard.gradient is not None
            by_axes[shard.layout.state.partial].append(shard.gradient)
    handles = [
        collectives.start_all_reduce_coalesced(gradients, axes, use="reduce", tag="gradient shards")
        for axes, gradients in sorted(by_axes.items(), key=lambda item: item[0])
    ]
    for handle in handles:
        handle.wait()


def scale_gradients(state: ParameterState, factor: torch.Tensor) -> None:
    """Multiplies every gradient by a 0-d factor, in place, without waiting for the device."""
    gradients = [shard.gradient for shard in _trained(state) if shard.gradient is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))


def local_square_norm(
    state: ParameterState, coordinate: Mapping[str, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Sum of squares of the gradient elements that this rank owns: 0-d, on `device`. The sum over all ranks counts each element once.

    Shards may lie on other devices (offload). One pass over all gradients of a device, in a few launches whatever their number.
    """
    by_device: defaultdict[torch.device, list[torch.Tensor]] = defaultdict(list)
    for shard in _trained(state):
        gradient = shard.gradient
        if gradient is not None and gradient.numel() and shard.layout.state.owns(coordinate):
            by_device[gradient.device].append(gradient)
    squares = [
        torch.stack(torch._foreach_norm(gradients, 2, dtype=dtype)).square().sum().to(device)
        for gradients in by_device.values()
    ]
    if len(squares) == 1:
        return squares[0]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=dtype, device=device)


def sum_over_world(values: Sequence[torch.Tensor], collectives: Collectives, dtype: torch.dtype) -> list[torch.Tensor]:
    """Sums 0-d numbers over all ranks in one all-reduce of a few bytes."""
    packed = torch.stack([value.detach().to(dtype) for value in values])
    collectives.start_all_reduce(packed, WORLD, use="reduce", tag="loss and norm").wait()
    return list(packed.unbind())


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """min(1, max_norm / norm), as torch.nn.utils.clip_grad_norm_ has it (1e-6 keeps the quotient finite)."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def _trained(state: ParameterState) -> list[Shard]:
    return [shard for shard in state.shards.values() if shard.layout.trainable]
