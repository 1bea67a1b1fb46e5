"""Where every element of a tensor lives: the one truth that norm, clipping, checkpoint, resharding, export, cost and verify read.

A `Placement` says how a tensor of a global shape is cut over the mesh. It is kept as cuts (a few integers, whatever the number of
ranks) and answers, for the coordinate of any rank, with `Piece`s: elements of the local storage <-> a box of the full tensor.
A `ParameterLayout` has two placements: `compute`, what the forward pass sees, and `state`, how the reduced gradient, the master
weight and the optimizer states are kept. `gather` goes from state to compute, `reduce` is its transpose.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from colossal_core.mesh import MeshLayout

Coordinate = Mapping[str, int]


@dataclass(frozen=True)
class Piece:
    """A box of the full tensor and where its elements lie in the flat local storage.

    `local.flatten().as_strided(sizes, strides, offset)` are the elements `full[starts[0]:starts[0]+sizes[0], ...]`.
    """

    offset: int
    strides: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def box(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.starts, self.sizes, strict=True))

    def view(self, local: torch.Tensor) -> torch.Tensor:
        """The piece's elements inside local storage: a view of shape `sizes`. `local` is contiguous."""
        return local.as_strided(self.sizes, self.strides, local.storage_offset() + self.offset)


@dataclass(frozen=True)
class DimCut:
    """One dimension cut along the flattened `axes`.

    intervals: for each flat coordinate along `axes`, the [start, stop) ranges of the dimension that it holds, in local order. More than
        one for packed layouts (a fused query-key-value weight); any sizes, so that uneven cuts need no rule of their own.
    padding: for each flat coordinate, elements added at the end of the dimension locally; they are in no piece.
    """

    dim: int
    axes: tuple[str, ...]
    intervals: tuple[tuple[tuple[int, int], ...], ...]
    padding: tuple[int, ...] = ()

    def local_size(self, index: int) -> int:
        return sum(stop - start for start, stop in self.intervals[index]) + (self.padding[index] if self.padding else 0)


@dataclass(frozen=True)
class FlatCut:
    """What is left after all dimension cuts, flattened row-major, cut along the flattened `axes`.

    ranges: `ranges[i][j]` is the [start, stop) range held by flat coordinate j along `axes`, for the i-th flat coordinate over the axes of
        the dimension cuts. One row stands for all i when every rank's local tensor has the same shape. An empty range is allowed.
    """

    axes: tuple[str, ...]
    ranges: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Placement:
    """How one tensor lies on the mesh.

    shape: the full tensor's shape.
    cuts: at most one cut for each dimension; `flat`: a further cut of the flattened local tensor, or None.
    replicated: axes along which ranks hold copies of the same elements. The copy with coordinate 0 on all of them is the owner: it
        counts in the norm and is the one that a checkpoint writes.
    partial: axes over which the local tensor is one summand of the true value (a gradient before its reduction).
    present: for some axes, the coordinates that hold the tensor at all (pipeline stages); all of them where an axis is not named.
    """

    shape: tuple[int, ...]
    cuts: tuple[DimCut, ...] = ()
    flat: FlatCut | None = None
    replicated: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    present: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def cut_axes(self) -> tuple[str, ...]:
        """The axes along which ranks hold different elements."""
        dims = tuple(axis for cut in self.cuts for axis in cut.axes)
        return dims + (self.flat.axes if self.flat else ())

    def is_present(self, coordinate: Coordinate) -> bool:
        return all(coordinate[axis] in held for axis, held in self.present)

    def owns(self, coordinate: Coordinate) -> bool:
        """Whether this rank is the one that counts its elements (in the norm, in a checkpoint) among all that hold copies."""
        first = all(coordinate[axis] == min(held) for axis, held in self.present)
        return first and all(coordinate[axis] == 0 for axis in self.replicated)

    def local_shape(self, coordinate: Coordinate, mesh: MeshLayout) -> tuple[int, ...]:
        """Shape of the local tensor: of the cut box with its padding, or the 1-D length of the flat range."""
        if not self.is_present(coordinate):
            return (0,)
        if self.flat is not None:
            start, stop = self._flat_range(coordinate, mesh)
            return (stop - start,)
        return self._box_shape(coordinate, mesh)

    def _box_shape(self, coordinate: Coordinate, mesh: MeshLayout) -> tuple[int, ...]:
        shape = list(self.shape)
        for cut in self.cuts:
            shape[cut.dim] = cut.local_size(mesh.flat_index(coordinate, cut.axes))
        return tuple(shape)

    def _flat_range(self, coordinate: Coordinate, mesh: MeshLayout) -> tuple[int, int]:
        assert self.flat is not None
        row = 0
        if len(self.flat.ranges) > 1:
            row = mesh.flat_index(coordinate, tuple(axis for cut in self.cuts for axis in cut.axes))
        return self.flat.ranges[row][mesh.flat_index(coordinate, self.flat.axes)]

    def pieces(self, coordinate: Coordinate, mesh: MeshLayout) -> tuple[Piece, ...]:
        """The pieces that the rank at `coordinate` holds, disjoint, in the order of local storage."""
        if not self.is_present(coordinate):
            return ()
        local_shape = self._box_shape(coordinate, mesh)
        strides = _row_major_strides(local_shape)
        whole = tuple(self._segments(dim, coordinate, mesh) for dim in range(len(self.shape)))
        if self.flat is None:
            return tuple(_piece(segments, strides, 0) for segments in itertools.product(*whole) if _numel(segments))
        start, stop = self._flat_range(coordinate, mesh)
        found = []
        for box in _boxes_of_flat_range(local_shape, start, stop):
            clipped = (tuple(_clip(segments, low, high)) for segments, (low, high) in zip(whole, box, strict=True))
            found += [_piece(segments, strides, start) for segments in itertools.product(*clipped) if _numel(segments)]
        return tuple(found)

    def _segments(self, dim: int, coordinate: Coordinate, mesh: MeshLayout) -> tuple[_Segment, ...]:
        """The dimension's local segments as (local start, full start, size)."""
        for cut in self.cuts:
            if cut.dim == dim:
                segments, local = [], 0
                for start, stop in cut.intervals[mesh.flat_index(coordinate, cut.axes)]:
                    segments.append((local, start, stop - start))
                    local += stop - start
                return tuple(segments)
        return ((0, 0, self.shape[dim]),)

    def reduce_dims(self, dims: tuple[int, ...]) -> Placement:
        """The placement of a statistic kept per row or column: this one with `dims` kept at size 1 (Adafactor's factors).

        Only for placements without a flat cut: a statistic of a flat range is not a range of the statistic.
        """
        assert self.flat is None, "a flat cut has no rows or columns: keep such a statistic replicated"
        shape = tuple(1 if dim in dims else size for dim, size in enumerate(self.shape))
        gone = tuple(axis for cut in self.cuts if cut.dim in dims for axis in cut.axes)
        kept = tuple(cut for cut in self.cuts if cut.dim not in dims)
        return replace(self, shape=shape, cuts=kept, replicated=self.replicated + gone)

    def as_replicated(self, shape: tuple[int, ...]) -> Placement:
        """The placement of a small tensor (a step counter) of which every rank that holds this one keeps the whole."""
        return Placement(shape, replicated=self.replicated + self.cut_axes, present=self.present)


_Segment = tuple[int, int, int]


@dataclass(frozen=True)
class ParameterLayout:
    """Everything that anyone needs to know about one parameter. Frozen, pure data, equal on every rank.

    full_name: the first name in the untouched model's `named_parameters()`; `aliases`: its other names when it is tied.
    block: name of the block it belongs to (the unit of gather, release and reduce), or "" for none.
    compute: what the forward pass sees. Its `partial` are the axes over which the gradient that autograd leaves is a summand.
    state: reduced gradient, master and optimizer states. Its `partial` are the axes that are still to be summed after `reduce`, once
        per step, on shards. So `reduce` sums over the difference, and no axis is summed twice.
    """

    full_name: str
    shape: tuple[int, ...]
    compute: Placement
    state: Placement
    aliases: tuple[str, ...] = ()
    block: str = ""
    trainable: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def reduce_axes(self) -> tuple[str, ...]:
        """The axes that `reduce` sums over inside the backward pass."""
        return tuple(axis for axis in self.compute.partial if axis not in self.state.partial)


def fill_full(full: torch.Tensor, local: torch.Tensor, pieces: tuple[Piece, ...]) -> None:
    """Copies local elements to their places in the full tensor."""
    for piece in pieces:
        full[piece.box].copy_(piece.view(local))


def take_local(local: torch.Tensor, full: torch.Tensor, pieces: tuple[Piece, ...]) -> None:
    """Copies a rank's elements out of the full tensor into its local storage; padding is left alone."""
    for piece in pieces:
        piece.view(local).copy_(full[piece.box])


def even_ranges(numel: int, parts: int) -> tuple[tuple[int, int], ...]:
    """[0, numel) in `parts` consecutive ranges of ceil(numel / parts) elements; the last ones may be shorter or empty."""
    step = -(-numel // parts)
    return tuple((min(index * step, numel), min((index + 1) * step, numel)) for index in range(parts))


def _row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _numel(segments: tuple[_Segment, ...]) -> int:
    return math.prod(size for _, _, size in segments)


def _piece(segments: tuple[_Segment, ...], strides: tuple[int, ...], flat_start: int) -> Piece:
    offset = sum(local * stride for (local, _, _), stride in zip(segments, strides, strict=True)) - flat_start
    starts = tuple(full for _, full, _ in segments)
    return Piece(offset, strides, starts, tuple(size for _, _, size in segments))


def _clip(segments: tuple[_Segment, ...], low: int, high: int) -> Iterator[_Segment]:
    """The parts of segments whose local positions fall into [low, high)."""
    for local, full, size in segments:
        first, last = max(local, low), min(local + size, high)
        if first < last:
            yield first, full + first - local, last - first


def _boxes_of_flat_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Splits the row-major flat range [start, stop) of a tensor into at most 2 * ndim - 1 boxes of [low, high) per dimension."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        for box in _boxes_of_flat_range(shape[1:], start - first * row, stop - first * row):
            yield ((first, first + 1), *box)
        return
    if start % row:
        for box in _boxes_of_flat_range(shape[1:], start - first * row, row):
            yield ((first, first + 1), *box)
        first += 1
    whole_stop = last + 1 if stop == (last + 1) * row else last
    if first < whole_stop:
        yield ((first, whole_stop), *((0, size) for size in shape[1:]))
    if whole_stop == last:
        for box in _boxes_of_flat_range(shape[1:], 0, stop - last * row):
            yield ((last, last + 1), *box)
