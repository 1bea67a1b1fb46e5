"""Matrices of which every rank of a group has a copy: each is orthogonalised by one of them, and sent to the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives, Handle
    from colossal_core.layout import ParameterLayout

Started = tuple[torch.Tensor, torch.Tensor, "Handle | None"]


class CopyExchange:
    """One bucket of matrices that no axis cuts. The same four steps as `MatrixExchange`; nothing has to be sent to an owner.

    Communication: one all-gather over `axes`, of n times what the busiest of n owners has, in the dtype of the iteration. So copies stay
    bit-identical, however the devices round.
    """

    def __init__(
        self,
        layouts: Sequence[ParameterLayout],
        owner_of: Sequence[int],
        axes: tuple[str, ...],
        collectives: Collectives,
        dtype: torch.dtype,
    ) -> None:
        """layouts, owner_of: of each matrix of the bucket; owners are places in the group over `axes`. dtype: of what is sent."""
        self._axes, self._collectives, self._dtype = axes, collectives, dtype
        self._num_owners, own = collectives.size(axes), collectives.index(axes)
        self._numels = [layout.numel for layout in layouts]
        self._owned = [
            _by_shape([index for index, owner in enumerate(owner_of) if owner == place], layouts)
            for place in range(self._num_owners)
        ]
        self._mine = self._owned[own]
        self._shapes = [layouts[indices[0]].shape for indices in self._mine]
        self._length = max(sum(self._numels[i] for indices in owned for i in indices) for owned in self._owned)

    def start_gather(self, locals_: Sequence[torch.Tensor]) -> Started:
        """locals_: each matrix, whole. What is returned is for `finish_gather`."""
        mine = [locals_[index].reshape(-1) for indices in self._mine for index in indices]
        flat = torch.cat(mine).to(self._dtype) if mine else locals_[0].new_empty(0, dtype=self._dtype)
        return flat, flat, None

    def finish_gather(self, started: Started) -> list[torch.Tensor]:
        """This rank's own matrices: one batch [k, m, n] for each shape."""
        sizes = [sum(self._numels[index] for index in indices) for indices in self._mine]
        parts = started[0].split(sizes)  # type: ignore[no-untyped-call]
        return [
            part.view(len(indices), *shape)
            for part, indices, shape in zip(parts, self._mine, self._shapes, strict=True)
        ]

    def start_scatter(self, batches: Sequence[torch.Tensor]) -> Started:
        """batches: as `finish_gather` gave them, changed. What is returned is for `finish_scatter`."""
        sent = torch.zeros(self._length, dtype=self._dtype, device=self._collectives.device)
        start = 0
        for batch in batches:
            sent[start : start + batch.numel()].copy_(batch.reshape(-1))
            start += batch.numel()
        received = sent.new_empty(self._length * self._num_owners)
        handle = self._collectives.start_all_gather(
            received, sent, self._axes, use="gather", tag="matrices from owners"
        )
        return sent, received, handle

    def finish_scatter(self, started: Started, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each changed matrix, in the shapes and dtypes of `like`."""
        _, received, handle = started
        if handle is not None:
            handle.wait()
        wide = received.to(like[0].dtype)
        found: dict[int, torch.Tensor] = {}
        for place, owned in enumerate(self._owned):
            start = place * self._length
            for index in (index for indices in owned for index in indices):
                found[index] = wide[start : start + self._numels[index]].view(like[index].shape)
                start += self._numels[index]
        return [found[index] for index in range(len(like))]


def _by_shape(indices: Sequence[int], layouts: Sequence[ParameterLayout]) -> list[list[int]]:
    """Matrices of equal shape together."""
    found: dict[tuple[int, ...], list[int]] = {}
    for index in indices:
        found.setdefault(tuple(layouts[index].shape), []).append(index)
    return list(found.values())
