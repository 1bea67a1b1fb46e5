"""Gathers and reduce-scatters of a middle dimension that start in pieces, so that a product of one piece runs while another is on its way.

Legend: L what lies before the sequence (samples), n ranks, r rows of a rank (its part of the sequence, with whatever follows it), D
features. A piece is a range of L: where there are few samples each is one message, straight from and into its place; where there are
many, all are one message, with a copy that moves the ranks' parts together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from colossal_tensor.operators import Route

if TYPE_CHECKING:
    from colossal_core.collectives import Handle

MOST_MESSAGES = 8
"""More samples than this are sent together."""


@dataclass(frozen=True)
class Piece:
    """samples: the range of L. wait: returns when it is there."""

    samples: slice
    wait: Callable[[], None]


def in_rows(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """[..., rows, ..., D] as [L, rows and what follows them, D], contiguous."""
    dim %= tensor.ndim
    assert dim < tensor.ndim - 1, f"dim {dim} of {tuple(tensor.shape)} is not in front of the features"
    samples, features = tensor.shape[:dim].numel(), tensor.shape[-1]
    rows = tensor.shape[dim:-1].numel()
    return tensor.detach().reshape(samples, rows, features).contiguous()


def start_gather(part_LrD: torch.Tensor, route: Route) -> tuple[torch.Tensor, list[Piece]]:
    """Starts to gather; returns the whole [L, n r, D] and its pieces. Sends (n-1)/n of the whole's bytes."""
    samples, rows, features = part_LrD.shape
    size, ranks = route.size, route.collectives
    whole = part_LrD.new_empty(samples, size * rows, features)
    if samples <= MOST_MESSAGES:
        return whole, [
            Piece(slice(place, place + 1), _gather(whole[place], part_LrD[place], route).wait)
            for place in range(samples)
        ]
    stacked = part_LrD.new_empty(size, samples, rows, features)
    handle = ranks.start_all_gather(stacked, part_LrD, route.axes, use="compute", tag=route.tag)

    def wait() -> None:
        handle.wait()
        whole.view(samples, size, rows, features).copy_(stacked.transpose(0, 1))

    return whole, [Piece(slice(0, samples), wait)]


def _gather(whole: torch.Tensor, part: torch.Tensor, route: Route) -> Handle:
    return route.collectives.start_all_gather(whole, part, route.axes, use="compute", tag=route.tag)


def pieces_of(samples: int) -> list[slice]:
    """In which ranges of L a result is best made, to be scattered one after another."""
    if samples <= MOST_MESSAGES:
        return [slice(place, place + 1) for place in range(samples)]
    return [slice(0, samples)]


def start_scatter(output_LrD: torch.Tensor, whole_LnrD: torch.Tensor, samples: slice, route: Route) -> Handle:
    """Starts to put this rank's range of the sum of whole[samples] into output[samples]. samples: one of `pieces_of`. Sends (n-1)/n of the
    bytes of whole[samples].
    """
    output, whole = output_LrD[samples], whole_LnrD[samples]
    if len(whole) > 1:
        num_samples, rows, features = output.shape
        whole = whole.view(num_samples, route.size, rows, features).transpose(0, 1).contiguous()
    return route.collectives.start_reduce_scatter(output, whole, route.axes, use="compute", tag=route.tag)
