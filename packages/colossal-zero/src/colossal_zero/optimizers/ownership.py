"""Which rank orthogonalises which matrix, and how the shards of a matrix travel to its owner and back.

Everything here follows from layouts, so that every rank finds the same owners without asking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from colossal_core.layout import Piece
from colossal_zero.optimizers.newton_schulz import flops

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives, Handle
    from colossal_core.layout import Coordinate, ParameterLayout
    from colossal_core.mesh import MeshLayout


def owners(shapes: Sequence[Sequence[int]], num_owners: int) -> list[int]:
    """An owner for each matrix: the largest first, each to who has least so far (Graham 1969: at most 4/3 of the best possible)."""
    loads = [0] * num_owners
    found = [0] * len(shapes)
    for index in by_falling_cost(shapes):
        owner = min(range(num_owners), key=lambda rank: (loads[rank], rank))
        found[index] = owner
        loads[owner] += flops(shapes[index])
    return found


def by_falling_cost(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Indices of matrices, the costliest first, equal shapes together."""
    return sorted(range(len(shapes)), key=lambda index: (-flops(shapes[index]), tuple(shapes[index]), index))


def bounded_buckets(shapes: Sequence[Sequence[int]], num_owners: int, elements: int) -> Iterator[list[int]]:
    """The matrices in sets of which each owner has about `elements` at most, in the order in which they are given out: so that each set is
    shared about evenly."""
    bucket: list[int] = []
    total = 0
    for index in by_falling_cost(shapes):
        numel = math.prod(shapes[index])
        if bucket and total + numel > elements * num_owners:
            yield bucket
            bucket, total = [], 0
        bucket.append(index)
        total += numel
    if bucket:
        yield bucket


@dataclass(frozen=True)
class _Held:
    """What one rank holds of one matrix. flat: pieces are of the flattened matrix (a range of it), else boxes of the matrix."""

    flat: bool
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        return sum(piece.numel for piece in self.pieces)

    def in_local(self, local: torch.Tensor) -> Iterator[torch.Tensor]:
        return (piece.view(local) for piece in self.pieces)

    def in_matrix(self, matrix: torch.Tensor) -> Iterator[torch.Tensor]:
        return ((matrix.view(-1) if self.flat else matrix)[piece.box] for piece in self.pieces)

    def in_message(self, message: torch.Tensor) -> Iterator[torch.Tensor]:
        """message: the flat range of a message for this matrix, pieces behind one another."""
        start = 0
        for piece in self.pieces:
            yield message[start : start + piece.numel].view(piece.sizes)
            start += piece.numel


def _held(layout: ParameterLayout, coordinate: Coordinate, mesh: MeshLayout) -> _Held:
    state = layout.state
    pieces = state.pieces(coordinate, mesh)
    if any(mesh.size(axis) > 1 for cut in state.cuts for axis in cut.axes) or state.flat is None:
        return _Held(False, pieces)
    numel = sum(piece.numel for piece in pieces)
    start = _flat_index(pieces[0].starts, layout.shape) if pieces else 0
    return _Held(True, (Piece(0, (1,), (start,), (numel,)),) if numel else ())


def _flat_index(starts: Sequence[int], shape: Sequence[int]) -> int:
    index = 0
    for start, size in zip(starts, shape, strict=True):
        index = index * size + start
    return index


class MatrixExchange:
    """One bucket of matrices: shards -> whole matrices at their owners -> shards, over the group of ranks that hold the shards.

    Communication, each way: one all-to-all over `axes`. With n ranks and M bytes of matrices in the bucket, a rank sends and receives about
    (n-1)/n M/n bytes. Nothing where the state is not cut.
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
        mesh = collectives.mesh
        ranks = mesh.group(collectives.rank, axes) if axes else (collectives.rank,)
        members = [mesh.coordinate(rank) for rank in ranks]
        own = ranks.index(collectives.rank)
        self._axes, self._collectives, self._dtype = axes, collectives, dtype
        self._sent_order = sorted(range(len(layouts)), key=lambda index: (owner_of[index], index))
        self._mine = [index for index in range(len(layouts)) if owner_of[index] == own]
        self._here = [_held(layout, members[own], mesh) for layout in layouts]
        self._there = [[_held(layouts[index], member, mesh) for index in self._mine] for member in members]
        self._to_owner = [
            sum(held.numel for held, owner in zip(self._here, owner_of, strict=True) if owner == place)
            for place in range(len(members))
        ]
        self._from_holder = [sum(held.numel for held in helds) for helds in self._there]
        self._shapes = [layouts[index].shape for index in self._mine]

    def start_gather(self, locals_: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Handle | None]:
        """locals_: this rank's part of each matrix, in the order of the bucket. What is returned is for `finish_gather`."""
        sent = locals_[0].new_empty(sum(self._to_owner), dtype=self._dtype)
        targets, sources = [], []
        for index, message in self._messages(sent):
            targets += list(self._here[index].in_message(message))
            sources += list(self._here[index].in_local(locals_[index]))
        _copy(targets, sources)
        return self._exchange(sent, self._from_holder, self._to_owner, "matrices to owners")

    def finish_gather(self, started: tuple[torch.Tensor, torch.Tensor, Handle | None]) -> list[torch.Tensor]:
        """This rank's own matrices, whole: one batch [k, m, n] for each shape."""
        _, received, handle = started
        if handle is not None:
            handle.wait()
        batches = [received.new_empty((len(places), *shape)) for shape, places in self._by_shape()]
        targets, sources = [], []
        for held, message, matrix in self._own_messages(received, batches):
            targets += list(held.in_matrix(matrix))
            sources += list(held.in_message(message))
        _copy(targets, sources)
        return batches

    def start_scatter(self, batches: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Handle | None]:
        """batches: as `finish_gather` gave them, changed. What is returned is for `finish_scatter`."""
        device = self._collectives.device
        sent = torch.empty(sum(self._from_holder), dtype=self._dtype, device=device)
        targets, sources = [], []
        for held, message, matrix in self._own_messages(sent, batches):
            targets += list(held.in_message(message))
            sources += list(held.in_matrix(matrix))
        _copy(targets, sources)
        return self._exchange(sent, self._to_owner, self._from_holder, "matrices from owners")

    def finish_scatter(
        self, started: tuple[torch.Tensor, torch.Tensor, Handle | None], like: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """This rank's part of each changed matrix, in the shapes and dtypes of `like`."""
        _, received, handle = started
        if handle is not None:
            handle.wait()
        wide = received.to(like[0].dtype) if like else received
        found = [torch.empty(0)] * len(like)
        for index, message in self._messages(wide):
            target = like[index]
            if message.numel() == target.numel() and (self._here[index].flat or len(self._here[index].pieces) == 1):
                found[index] = message.view(target.shape)
                continue
            found[index] = torch.zeros_like(target, requires_grad=False)
            _copy(list(self._here[index].in_local(found[index])), list(self._here[index].in_message(message)))
        return found

    def _exchange(
        self, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int], tag: str
    ) -> tuple[torch.Tensor, torch.Tensor, Handle | None]:
        if not self._axes:
            return sent, sent, None
        received = sent.new_empty(sum(received_sizes))
        handle = self._collectives.start_all_to_all(
            received, sent, self._axes, output_sizes=received_sizes, input_sizes=sent_sizes, tag=tag
        )
        return sent, received, handle

    def _messages(self, flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(index of a matrix, its range of a message that is ordered by owner)."""
        start = 0
        for index in self._sent_order:
            stop = start + self._here[index].numel
            yield index, flat[start:stop]
            start = stop

    def _by_shape(self) -> list[tuple[tuple[int, ...], list[int]]]:
        """Shapes of this rank's own matrices, and which of them have each."""
        found: dict[tuple[int, ...], list[int]] = {}
        for place, shape in enumerate(self._shapes):
            found.setdefault(tuple(shape), []).append(place)
        return list(found.items())

    def _own_messages(
        self, flat: torch.Tensor, batches: Sequence[torch.Tensor]
    ) -> Iterator[tuple[_Held, torch.Tensor, torch.Tensor]]:
        """(what a rank holds, its range of a message that is ordered by rank, the matrix) for each of this rank's own matrices."""
        matrices: dict[int, torch.Tensor] = {}
        for (_, places), batch in zip(self._by_shape(), batches, strict=True):
            matrices.update(zip(places, batch.unbind(), strict=True))
        start = 0
        for helds in self._there:
            for place, held in enumerate(helds):
                stop = start + held.numel
                yield held, flat[start:stop], matrices[place]
                start = stop


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
