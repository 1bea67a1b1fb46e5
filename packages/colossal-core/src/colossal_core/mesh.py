"""The mesh as data: named axes over ranks, and the groups that they form. No process group is made here (colossal-comm does).

Ranks are the row-major flattening of the five base axes, outermost first: `pp, dp_replicate, dp_shard, cp, tp`. Every other name is
derived: a digit of the flattened coordinate of some base axes. So a *fold* (`dp` = dp_replicate x dp_shard, `shard` = dp_shard x cp),
a *factor* (`tp_row`, `tp_column` of tp) and the experts' view (`[edp, ep]` over dp_shard x cp x tp) are one mechanism, and a
coordinate, a group or a layout may use any of these names alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

BASE_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Names of the base axes, outermost first."""

WORLD = BASE_AXES
"""The axes that together are all ranks: pass it where a group of axes is asked for."""


@dataclass(frozen=True)
class DerivedAxis:
    """An axis read off others: its coordinate is `(flat(sources) // stride) % size`, `flat` row-major over `sources` in order."""

    name: str
    sources: tuple[str, ...]
    size: int
    stride: int = 1


@dataclass(frozen=True)
class MeshLayout:
    """Sizes of the base axes, the derived axes, and every group of ranks. Pure data, equal on every rank.

    sizes: one size for each of `BASE_AXES`, all at least 1.
    derived: folds and factors that strategies added (`with_axis`). `dp` and `shard` are always there.
    sharing: sets of `pp` coordinates that hold one and the same parameter (a tied embedding across stages), by the parameter's name.
    """

    sizes: tuple[int, int, int, int, int] = (1, 1, 1, 1, 1)
    derived: tuple[DerivedAxis, ...] = ()
    sharing: tuple[tuple[str, tuple[int, ...]], ...] = ()
    _folds: tuple[DerivedAxis, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        assert len(self.sizes) == len(BASE_AXES) and all(size >= 1 for size in self.sizes), self.sizes
        replicate, shard, context = self.sizes[1], self.sizes[2], self.sizes[3]
        folds = (
            DerivedAxis("dp", ("dp_replicate", "dp_shard"), replicate * shard),
            DerivedAxis("shard", ("dp_shard", "cp"), shard * context),
        )
        object.__setattr__(self, "_folds", folds)

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    @cached_property
    def _derived_by_name(self) -> dict[str, DerivedAxis]:
        return {axis.name: axis for axis in (*self._folds, *self.derived)}

    @property
    def axis_names(self) -> tuple[str, ...]:
        return (*BASE_AXES, *self._derived_by_name)

    def with_axis(self, axis: DerivedAxis) -> MeshLayout:
        """This mesh with one more derived axis; its sources must exist and its name must be new."""
        assert axis.name not in self.axis_names, f"axis {axis.name} exists"
        total = math.prod(self.size(source) for source in axis.sources)
        assert total % (axis.size * axis.stride) == 0, f"{axis} does not divide {total}"
        return MeshLayout(self.sizes, (*self.derived, axis), self.sharing)

    def size(self, axes: str | Sequence[str]) -> int:
        """Number of ranks in one group over `axes` (the product of their sizes)."""
        if not isinstance(axes, str):
            return math.prod(self.size(axis) for axis in axes)
        if axes in BASE_AXES:
            return self.sizes[BASE_AXES.index(axes)]
        return self._derived_by_name[axes].size

    def coordinate(self, rank: int) -> dict[str, int]:
        """The coordinate of a rank along every axis, derived ones included."""
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        found: dict[str, int] = {}
        rest = rank
        for name, size in zip(reversed(BASE_AXES), reversed(self.sizes), strict=True):
            rest, found[name] = divmod(rest, size)
        for axis in self._derived_by_name.values():
            flat = self.flat_index(found, axis.sources)
            found[axis.name] = (flat // axis.stride) % axis.size
        return found

    def flat_index(self, coordinate: Mapping[str, int], axes: Sequence[str]) -> int:
        """Row-major index of a coordinate in the flattened `axes`: a rank's place in its group over them."""
        flat = 0
        for axis in axes:
            flat = flat * self.size(axis) + coordinate[axis]
        return flat

    def rank(self, coordinate: Mapping[str, int]) -> int:
        """The rank at a coordinate of the base axes."""
        return self.flat_index(coordinate, BASE_AXES)

    def _base_of(self, axes: Sequence[str]) -> tuple[str, ...]:
        found: set[str] = set()
        pending = list(axes)
        while pending:
            axis = pending.pop()
            if axis in BASE_AXES:
                found.add(axis)
            else:
                pending.extend(self._derived_by_name[axis].sources)
        return tuple(axis for axis in BASE_AXES if axis in found)

    def group(self, rank: int, axes: str | Sequence[str]) -> tuple[int, ...]:
        """The ranks that differ from `rank` only along `axes`, ordered by their flat index over `axes` (as given, row-major)."""
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        own = self.coordinate(rank)
        base = self._base_of(axes)
        if base == axes:  # the common case, without enumerating candidates that only a derived axis would rule out
            choices = itertools.product(*(range(self.size(axis)) for axis in axes))
            return tuple(self.rank({**own, **dict(zip(axes, choice, strict=True))}) for choice in choices)
        # A derived axis varies some digits of its sources and keeps the others: those others are the rest of the mixed radix.
        fixed = {name: self._other_digits(own, self._derived_by_name[name]) for name in axes if name not in BASE_AXES}
        members: dict[int, int] = {}
        for choice in itertools.product(*(range(self.size(axis)) for axis in base)):
            candidate = {**own, **dict(zip(base, choice, strict=True))}
            other = self.rank(candidate)
            full = self.coordinate(other)
            if all(self._other_digits(full, self._derived_by_name[name]) == digits for name, digits in fixed.items()):
                members[self.flat_index(full, axes)] = other
        assert len(members) == self.size(axes), f"axes {axes} do not form a group: {members}"
        return tuple(members[index] for index in sorted(members))

    def _other_digits(self, coordinate: Mapping[str, int], axis: DerivedAxis) -> tuple[int, int]:
        flat = self.flat_index(coordinate, axis.sources)
        return flat // (axis.stride * axis.size), flat % axis.stride

    def groups(self, axes: str | Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """All groups over `axes`, each rank in exactly one, ordered by their first rank."""
        seen: set[int] = set()
        found = []
        for rank in range(self.world_size):
            if rank not in seen:
                group = self.group(rank, axes)
                seen.update(group)
                found.append(group)
        return tuple(found)
