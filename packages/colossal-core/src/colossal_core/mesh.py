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

DATA_AXES = ("dp_replicate", "dp_shard")
"""The axes along which ranks get different sequences."""

SAME_BATCH_AXES = ("pp", "cp", "tp")
"""The axes along which ranks get the same sequences."""

LOSS_AXES = ("dp_replicate", "dp_shard", "cp")
"""The axes over which the loss of a step is a sum: the data axes, and cp, which splits each sequence."""


@dataclass(frozen=True)
class DerivedAxis:
    """An axis read off others: its coordinate is `(flat(sources) // stride) % size`, `flat` row-major over `sources` in order."""

    name: str
    sources: tuple[str, ...]
    size: int
    stride: int = 1


@dataclass(frozen=True)
class SharingSet:
    """Pipeline stages that hold one and the same parameter (a tied embedding), as an axis: `stages` are pp coordinates, ascending.

    Only ranks of those stages have a coordinate along it; the lowest stage owns what is shared.
    """

    name: str
    stages: tuple[int, ...]


@dataclass(frozen=True)
class MeshLayout:
    """Sizes of the base axes, the derived axes, and every group of ranks. Pure data, equal on every rank.

    sizes: one size for each of `BASE_AXES`, all at least 1.
    derived: folds and factors that strategies added (`with_axis`). `dp` and `shard` are always there.
    sharing: sets of stages that hold one and the same parameter; a group over one, alone or with axes other than pp, is asked for by name.
    """

    sizes: tuple[int, int, int, int, int] = (1, 1, 1, 1, 1)
    derived: tuple[DerivedAxis, ...] = ()
    sharing: tuple[SharingSet, ...] = ()
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
        return (*BASE_AXES, *self._derived_by_name, *(shared.name for shared in self.sharing))

    def with_axis(self, axis: DerivedAxis) -> MeshLayout:
        """This mesh with one more derived axis; its sources must exist and its name must be new."""
        assert axis.name not in self.axis_names, f"axis {axis.name} exists"
        total = math.prod(self.size(source) for source in axis.sources)
        assert total % (axis.size * axis.stride) == 0, f"{axis} does not divide {total}"
        mesh = MeshLayout(self.sizes, (*self.derived, axis), self.sharing)
        mesh._digit(axis.name)
        return mesh

    def with_sharing(self, shared: SharingSet) -> MeshLayout:
        """This mesh with one more set of stages that share a parameter."""
        assert shared.name not in self.axis_names, f"axis {shared.name} exists"
        assert shared.stages == tuple(sorted(set(shared.stages))) and shared.stages[-1] < self.size("pp"), shared
        return MeshLayout(self.sizes, self.derived, (*self.sharing, shared))

    def _shared(self, name: str) -> SharingSet | None:
        return next((shared for shared in self.sharing if shared.name == name), None)

    def size(self, axes: str | Sequence[str]) -> int:
        """Number of ranks in one group over `axes` (the product of their sizes)."""
        if not isinstance(axes, str):
            return math.prod(self.size(axis) for axis in axes)
        if axes in BASE_AXES:
            return self.sizes[BASE_AXES.index(axes)]
        shared = self._shared(axes)
        if shared is not None:
            return len(shared.stages)
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
        for shared in self.sharing:
            if found["pp"] in shared.stages:
                found[shared.name] = shared.stages.index(found["pp"])
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

    def _digit(self, name: str) -> tuple[tuple[str, ...], int]:
        """The axis as a digit of base axes: its coordinate is `(flat(base axes) // stride) % size`. Returns (base axes, stride)."""
        if name in BASE_AXES:
            return (name,), 1
        axis = self._derived_by_name[name]
        if len(axis.sources) == 1:
            base, stride = self._digit(axis.sources[0])
            return base, stride * axis.stride
        found: list[str] = []
        for source in axis.sources:
            base, stride = self._digit(source)
            whole = stride == 1 and self.size(base) == self.size(source)
            assert whole, f"axis {name}: {source} is a factor, and a factor can only be factored further by itself"
            found += base
        assert len(set(found)) == len(found), f"axis {name} has one of {found} twice"
        return tuple(found), axis.stride

    def base_axes(self, axes: Sequence[str]) -> tuple[str, ...]:
        """The base axes that `axes` are read off, outermost first; a sharing set is read off `pp`."""
        found = {base for axis in axes for base in (("pp",) if self._shared(axis) else self._digit(axis)[0])}
        return tuple(axis for axis in BASE_AXES if axis in found)

    def group(self, rank: int, axes: str | Sequence[str]) -> tuple[int, ...]:
        """The ranks that differ from `rank` only along `axes`, ordered by their flat index over `axes` (as given, row-major)."""
        axes = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if self.size(axis) > 1)
        own = self.coordinate(rank)
        place = next((place for place, axis in enumerate(axes) if self._shared(axis)), None)
        if place is not None:
            return self._group_over_stages(own, axes, place)
        digits = [self._digit(axis) for axis in axes]
        folds = tuple(dict.fromkeys(base for base, _ in digits))
        together = [axis for base in folds for axis in base]
        assert len(set(together)) == len(together), f"axes {axes} do not form a group: they cut {together} in two ways"
        kept = {base: self.flat_index(own, base) for base in folds}
        for axis, (base, stride) in zip(axes, digits, strict=True):
            kept[base] -= own[axis] * stride
        members = []
        for choice in itertools.product(*(range(self.size(axis)) for axis in axes)):
            flat = dict(kept)
            for index, (base, stride) in zip(choice, digits, strict=True):
                flat[base] += index * stride
            coordinate = dict(own)
            for base, rest in flat.items():
                for axis in reversed(base):
                    rest, coordinate[axis] = divmod(rest, self.size(axis))
            members.append(self.rank(coordinate))
        assert len(set(members)) == len(members), f"axes {axes} do not form a group: {members}"
        return tuple(members)

    def _group_over_stages(self, own: Mapping[str, int], axes: tuple[str, ...], place: int) -> tuple[int, ...]:
        """`group` where `axes[place]` is a sharing set: the group over the other axes on each of its stages, in row-major order."""
        shared, others = self._shared(axes[place]), axes[:place] + axes[place + 1 :]
        assert shared is not None and shared.name in own, f"rank {self.rank(own)} is on none of the stages of {shared}"
        assert "pp" not in self.base_axes(others), f"axes {axes} do not form a group: they cut pp in two ways"
        on_stages = [self.group(self.rank({**own, "pp": stage}), others) for stage in shared.stages]
        inner = self.size(axes[place + 1 :])
        starts = range(0, len(on_stages[0]), inner)
        return tuple(member for start in starts for ranks in on_stages for member in ranks[start : start + inner])

    def groups(self, axes: str | Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """All groups over `axes` (not over a sharing set), each rank in exactly one, ordered by their first rank."""
        seen: set[int] = set()
        found = []
        for rank in range(self.world_size):
            if rank not in seen:
                group = self.group(rank, axes)
                seen.update(group)
                found.append(group)
        return tuple(found)
