"""Which parameter lies where in which flat bucket: the decision of every stage, as pure data.

Buckets are filled in the order in which gradients arrive, taken to be the reverse of the order of registration. A bucket never mixes a
block's parameters with those outside every block, nor parameters of different pipeline stages, nor trained with frozen ones, and starts
each parameter at a multiple of `ALIGNMENT` elements, so that every view keeps the alignment that matrix products want.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from colossal_core.layout import FlatCut, ParameterLayout, Placement
from colossal_core.mesh import MeshLayout

ALIGNMENT = 64
"""Elements: 128 bytes in bfloat16."""

DEFAULT_BUCKET_BYTES = 128 * 2**20
"""A message of this size comes near to what NVLink reaches with a larger one (H200, measured)."""

SHARD_AXES = ("dp_shard", "cp")
"""The axes along which the state is cut, flattened."""


@dataclass(frozen=True)
class Bucket:
    """Parameters that are reduced and gathered in one message. names: full names in the order of the flat buffer."""

    names: tuple[str, ...]


def buckets_of(
    layouts: Sequence[ParameterLayout],
    blocks: Sequence[str],
    bucket_elements: int,
    mesh: MeshLayout,
    *,
    whole_blocks: bool = False,
    stage_units: Sequence[Sequence[str]] = (),
) -> tuple[Bucket, ...]:
    """`assign_buckets`, with buckets of their own for what must not lie together.

    What other axes cut unevenly: where ranks differ in the size of one member, they would also differ in where the next one begins, and
    copies of that one must be cut alike. And what different pipeline stages use (stage_units: units by stage), whose gradients come in
    different backward passes; what several ranks share lies alike on all of them.
    """
    stages = {
        unit: tuple(stage for stage, units in enumerate(stage_units) if unit in units)
        for unit in dict.fromkeys(layout.block for layout in layouts)
    }
    kinds = {
        layout.full_name: (_unevenness(layout.compute, mesh), layout.compute.present, stages[layout.block])
        for layout in layouts
    }
    found = [
        bucket
        for kind in dict.fromkeys(kinds.values())
        for bucket in assign_buckets(
            [layout for layout in layouts if kinds[layout.full_name] == kind],
            blocks,
            bucket_elements,
            whole_blocks=whole_blocks,
        )
    ]
    place = {layout.full_name: index for index, layout in enumerate(layouts)}
    return tuple(sorted(found, key=lambda bucket: -place[bucket.names[0]]))


def _unevenness(placement: Placement, mesh: MeshLayout) -> tuple[str, ...]:
    """The axes along which the ranks' parts differ in size; none for a placement whose parts are all alike."""
    shapes = {placement.local_shape(coordinate, mesh) for coordinate in compute_coordinates(placement, mesh)}
    return tuple(axis for cut in placement.cuts for axis in cut.axes) if len(shapes) > 1 else ()


def assign_buckets(
    layouts: Iterable[ParameterLayout], blocks: Sequence[str], bucket_elements: int, *, whole_blocks: bool = False
) -> tuple[Bucket, ...]:
    """The buckets of some parameters, in the order in which their reductions are expected to start.

    whole_blocks: a block's parameters are one bucket and share it with no other block's, as stages need that gather or reduce by block.
    """
    inside = frozenset(blocks)
    buckets: list[Bucket] = []
    names: list[str] = []
    filled, key = 0, None
    for layout in reversed(list(layouts)):
        in_block = layout.block in inside
        own_key = (layout.block if in_block and whole_blocks else in_block, layout.compute.present)
        limited = not (in_block and whole_blocks)
        if names and (own_key != key or (limited and filled + layout.numel > bucket_elements)):
            buckets.append(Bucket(tuple(names)))
            names, filled = [], 0
        names.append(layout.full_name)
        filled += layout.numel
        key = own_key
    if names:
        buckets.append(Bucket(tuple(names)))
    return tuple(buckets)


@dataclass(frozen=True)
class BucketShape:
    """A bucket's flat buffer on the ranks of one compute coordinate. offsets: start of each parameter; length: elements, padding at the
    end included, a multiple of `num_shards * ALIGNMENT`. Shard j is the range [j * length / num_shards, (j + 1) * length / num_shards).
    """

    offsets: tuple[int, ...]
    numels: tuple[int, ...]
    length: int
    num_shards: int

    @property
    def shard_length(self) -> int:
        return self.length // self.num_shards

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """The [start, stop) ranges of padding, in order."""
        ends = [offset + numel for offset, numel in zip(self.offsets, self.numels, strict=True)]
        starts = [*self.offsets[1:], self.length]
        return tuple((end, start) for end, start in zip(ends, starts, strict=True) if start > end)

    def held(self, position: int, shard: int) -> tuple[int, int]:
        """The [start, stop) range of the parameter at `position` that shard `shard` holds; empty ranges are (k, k)."""
        start, stop = (
            shard * self.shard_length - self.offsets[position],
            (shard + 1) * self.shard_length - self.offsets[position],
        )
        numel = self.numels[position]
        low = min(max(start, 0), numel)
        return low, max(min(stop, numel), low)


def bucket_shape(numels: Sequence[int], num_shards: int) -> BucketShape:
    """Lays out parameters of the given local sizes one after another."""
    offsets, end = [], 0
    for numel in numels:
        offsets.append(end)
        end += -(-numel // ALIGNMENT) * ALIGNMENT
    unit = num_shards * ALIGNMENT
    return BucketShape(tuple(offsets), tuple(numels), -(-end // unit) * unit, num_shards)


def most_in_flight(sent_bytes: Sequence[int]) -> int:
    """Bytes of transient gradient buffers that exist at once, for the buckets of a rank: the largest and one of the usual size.

    So one can be reduced while the next is filled, and the largest (a table of embeddings is often larger than two blocks) does not make
    the blocks behind it wait.
    """
    return max(sent_bytes) + sorted(sent_bytes)[len(sent_bytes) // 2] if sent_bytes else 0


def compute_coordinates(placement: Placement, mesh: MeshLayout) -> list[dict[str, int]]:
    """One coordinate for each flat index over the axes that cut the compute placement, the others at 0 or where it is present."""
    axes = tuple(axis for cut in placement.cuts for axis in cut.axes)
    rest = dict.fromkeys(mesh.axis_names, 0) | {axis: held[0] for axis, held in placement.present}
    choices = itertools.product(*(range(mesh.size(axis)) for axis in axes))
    return [{**rest, **dict(zip(axes, choice, strict=True))} for choice in choices]


def sharded_layouts(
    layouts: Mapping[str, ParameterLayout], buckets: Sequence[Bucket], mesh: MeshLayout
) -> dict[str, ParameterLayout]:
    """Stages 1 to 3: every bucket's flat buffer cut into equal shards along `dp_shard x cp`; reduced over them in the backward pass."""
    num_shards = mesh.size(SHARD_AXES)
    changed = {}
    for bucket in buckets:
        members = [layouts[name] for name in bucket.names]
        coordinates = compute_coordinates(members[0].compute, mesh)
        rows = []
        for coordinate in coordinates:
            shape = bucket_shape(
                [math.prod(member.compute.local_shape(coordinate, mesh)) for member in members], num_shards
            )
            rows.append(
                [tuple(shape.held(position, shard) for shard in range(num_shards)) for position in range(len(members))]
            )
        for position, member in enumerate(members):
            ranges = tuple(row[position] for row in rows)
            if len(set(ranges)) == 1:
                ranges = ranges[:1]
            changed[member.full_name] = replace(member, state=_without(member.compute, FlatCut(SHARD_AXES, ranges)))
    return changed


def replicated_layouts(layouts: Mapping[str, ParameterLayout]) -> dict[str, ParameterLayout]:
    """Stage 0: whole states everywhere; still reduced in the backward pass."""
    trained = (layout for layout in layouts.values() if layout.trainable)
    return {
        layout.full_name: replace(layout, state=replace(layout.compute, partial=_still_partial(layout.compute)))
        for layout in trained
    }


def _without(compute: Placement, flat: FlatCut) -> Placement:
    replicated = tuple(axis for axis in compute.replicated if axis not in flat.axes)
    return replace(compute, flat=flat, replicated=replicated, partial=_still_partial(compute))


def _still_partial(compute: Placement) -> tuple[str, ...]:
    return tuple(axis for axis in compute.partial if axis not in SHARD_AXES)
