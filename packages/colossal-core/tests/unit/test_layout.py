"""Placements against an oracle that knows no pieces: it indexes an array of element numbers dimension by dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colossal_core.layout import (
    DimCut,
    FlatCut,
    ParameterLayout,
    Placement,
    even_ranges,
    fill_full,
    take_local,
)
from colossal_core.mesh import DerivedAxis, MeshLayout

EXPERT_SOURCES = ("dp_shard", "cp", "tp")
VIEWS = (
    ("pp", "dp_replicate", "dp_shard", "cp", "tp"),
    ("pp", "dp_replicate", "shard", "tp"),
    ("pp", "dp_replicate", "edp", "ep"),
    ("pp", "dp", "cp", "tp_row", "tp_column"),
)
PAD = -1


@st.composite
def meshes(draw: st.DrawFn) -> MeshLayout:
    sizes = draw(st.sampled_from([(1, 1, 2, 1, 2), (2, 2, 2, 1, 1), (1, 1, 2, 2, 4), (1, 2, 3, 1, 2), (2, 1, 1, 2, 4)]))
    mesh = MeshLayout(sizes)
    experts, tp = mesh.size(EXPERT_SOURCES), mesh.size("tp")
    ep = draw(st.sampled_from([size for size in (1, 2, 4) if experts % size == 0]))
    row = draw(st.sampled_from([size for size in (1, 2, 4) if tp % size == 0]))
    mesh = mesh.with_axis(DerivedAxis("edp", EXPERT_SOURCES, experts // ep, ep))
    mesh = mesh.with_axis(DerivedAxis("ep", EXPERT_SOURCES, ep))
    mesh = mesh.with_axis(DerivedAxis("tp_row", ("tp",), row, tp // row))
    return mesh.with_axis(DerivedAxis("tp_column", ("tp",), tp // row))


def ranges_that_tile(draw: st.DrawFn, numel: int, parts: int) -> tuple[tuple[int, int], ...]:
    """One range a part, uneven, some empty, handed out in any order."""
    stops = sorted(draw(st.lists(st.integers(0, numel), min_size=parts - 1, max_size=parts - 1)))
    edges = [0, *stops, numel]
    return tuple(draw(st.permutations(list(pairwise(edges)))))


@st.composite
def dim_cuts(draw: st.DrawFn, dim: int, size: int, axes: tuple[str, ...], parts: int) -> DimCut:
    """Every part holds any number of intervals, in any local order, and some padding."""
    if draw(st.booleans()):
        held = [[interval] for interval in even_ranges(size, parts)]
    else:
        held = [[] for _ in range(parts)]
        for interval in ranges_that_tile(draw, size, draw(st.integers(1, 2 * parts))):
            held[draw(st.integers(0, parts - 1))].append(interval)
    intervals = tuple(tuple(own) for own in held)
    padding = draw(st.one_of(st.just(()), st.tuples(*[st.integers(0, 2)] * parts)))
    return DimCut(dim, axes, intervals, padding)


@st.composite
def placements(draw: st.DrawFn, *, flat: bool = True) -> tuple[MeshLayout, Placement]:
    mesh = draw(meshes())
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    uses: dict[int | str, list[str]] = {}
    for axis in draw(st.permutations(draw(st.sampled_from(VIEWS)))):
        use = draw(st.sampled_from([*range(len(shape)), *(["flat"] if flat else []), "replicated"]))
        uses.setdefault(use, []).append(axis)
    present: tuple[tuple[str, tuple[int, ...]], ...] = ()
    replicated = tuple(uses.get("replicated", ()))
    if "pp" in replicated and draw(st.booleans()):
        held = draw(st.sets(st.integers(0, mesh.size("pp") - 1), min_size=1))
        present, replicated = (("pp", tuple(sorted(held))),), tuple(axis for axis in replicated if axis != "pp")
    cuts = tuple(
        draw(dim_cuts(use, shape[use], tuple(axes), mesh.size(axes)))
        for use, axes in uses.items()
        if isinstance(use, int)
    )
    placement = Placement(shape, cuts, None, replicated, (), present)
    if "flat" in uses:
        placement = draw(with_flat_cut(mesh, placement, tuple(uses["flat"])))
    return mesh, placement


@st.composite
def with_flat_cut(draw: st.DrawFn, mesh: MeshLayout, placement: Placement, axes: tuple[str, ...]) -> Placement:
    dim_axes = tuple(axis for cut in placement.cuts for axis in cut.axes)
    sizes: dict[int, int] = {}
    for rank in range(mesh.world_size):
        coordinate = mesh.coordinate(rank)
        sizes[mesh.flat_index(coordinate, dim_axes)] = len(oracle_local(placement, {**coordinate}, mesh))
    rows = [sizes[row] for row in range(mesh.size(dim_axes))]
    if len(set(rows)) == 1 and draw(st.booleans()):
        rows = rows[:1]
    ranges = tuple(
        even_ranges(numel, mesh.size(axes)) if draw(st.booleans()) else ranges_that_tile(draw, numel, mesh.size(axes))
        for numel in rows
    )
    return Placement(
        placement.shape, placement.cuts, FlatCut(axes, ranges), placement.replicated, (), placement.present
    )


def oracle_local(placement: Placement, coordinate: Mapping[str, int], mesh: MeshLayout) -> torch.Tensor:
    """The element numbers of the flattened local tensor, PAD where padded, as if the tensor were present everywhere."""
    local = torch.arange(math.prod(placement.shape)).reshape(placement.shape)
    for cut in placement.cuts:
        index = mesh.flat_index(coordinate, cut.axes)
        held = [position for start, stop in cut.intervals[index] for position in range(start, stop)]
        local = local.index_select(cut.dim, torch.tensor(held, dtype=torch.int64))
        if cut.padding:
            padding = [*local.shape]
            padding[cut.dim] = cut.padding[index]
            local = torch.cat((local, torch.full(padding, PAD)), dim=cut.dim)
    local = local.flatten()
    if placement.flat is not None:
        dim_axes = tuple(axis for cut in placement.cuts for axis in cut.axes)
        row = mesh.flat_index(coordinate, dim_axes) if len(placement.flat.ranges) > 1 else 0
        start, stop = placement.flat.ranges[row][mesh.flat_index(coordinate, placement.flat.axes)]
        local = local[start:stop]
    return local


@given(placements())
def test_local_elements_are_the_oracles(case: tuple[MeshLayout, Placement]) -> None:
    mesh, placement = case
    full = torch.arange(math.prod(placement.shape)).reshape(placement.shape)
    for rank in range(mesh.world_size):
        coordinate = mesh.coordinate(rank)
        shape = placement.local_shape(coordinate, mesh)
        local = torch.full(shape, PAD)
        pieces = placement.pieces(coordinate, mesh)
        take_local(local, full, pieces)
        if not placement.is_present(coordinate):
            assert (shape, pieces) == ((0,), ())
            continue
        assert torch.equal(local.flatten(), oracle_local(placement, coordinate, mesh))
        assert sum(piece.numel for piece in pieces) == int((local != PAD).sum())
        assert [piece.offset for piece in pieces] == sorted({piece.offset for piece in pieces})


@given(placements())
def test_owners_hold_every_element_once_and_copies_agree(case: tuple[MeshLayout, Placement]) -> None:
    mesh, placement = case
    owned = torch.zeros(placement.shape, dtype=torch.int64)
    held = torch.zeros(placement.shape, dtype=torch.int64)
    for rank in range(mesh.world_size):
        coordinate = mesh.coordinate(rank)
        for piece in placement.pieces(coordinate, mesh):
            held[piece.box] += 1
            if placement.owns(coordinate):
                owned[piece.box] += 1
    assert torch.equal(owned, torch.ones_like(owned))
    copies = mesh.size(placement.replicated) * math.prod(len(kept) for _, kept in placement.present)
    assert torch.equal(held, torch.full_like(held, copies))


@given(placements())
def test_out_of_the_full_tensor_and_back_bit_by_bit(case: tuple[MeshLayout, Placement]) -> None:
    mesh, placement = case
    numel = math.prod(placement.shape)
    full = torch.randint(-(2**62), 2**62, (numel,), generator=torch.Generator().manual_seed(numel))
    full = full.view(torch.float64).reshape(placement.shape)  # every bit pattern, NaNs too
    back = torch.zeros_like(full)
    for rank in range(mesh.world_size):
        coordinate = mesh.coordinate(rank)
        pieces = placement.pieces(coordinate, mesh)
        shape = placement.local_shape(coordinate, mesh)
        storage = torch.zeros(math.prod(shape) + 3, dtype=torch.float64)
        local = storage[3:].view(shape)  # a shard inside a bucket
        take_local(local, full, pieces)
        if placement.owns(coordinate):
            fill_full(back, local, pieces)
        assert not bool(storage[:3].any())
    assert torch.equal(back.view(torch.int64), full.view(torch.int64))


@given(placements(flat=False), st.data())
def test_a_statistic_of_rows_or_columns_is_placed_as_they_are(
    case: tuple[MeshLayout, Placement], data: st.DataObject
) -> None:
    mesh, placement = case
    dims = tuple(data.draw(st.sets(st.integers(0, len(placement.shape) - 1)))) if placement.shape else ()
    statistic = placement.reduce_dims(dims)
    assert statistic.shape == tuple(1 if dim in dims else size for dim, size in enumerate(placement.shape))
    owned = torch.zeros(statistic.shape, dtype=torch.int64)
    for rank in range(mesh.world_size):
        coordinate = mesh.coordinate(rank)
        local, reduced = placement.local_shape(coordinate, mesh), statistic.local_shape(coordinate, mesh)
        if placement.is_present(coordinate):
            assert reduced == tuple(1 if dim in dims else size for dim, size in enumerate(local))
        if statistic.owns(coordinate):
            for piece in statistic.pieces(coordinate, mesh):
                owned[piece.box] += 1
    assert torch.equal(owned, torch.ones_like(owned))


@given(placements())
def test_a_counter_is_whole_wherever_the_tensor_is(case: tuple[MeshLayout, Placement]) -> None:
    mesh, placement = case
    counter = placement.as_replicated(())
    coordinates = [mesh.coordinate(rank) for rank in range(mesh.world_size)]
    for coordinate in coordinates:
        assert counter.is_present(coordinate) == placement.is_present(coordinate)
        if counter.is_present(coordinate):
            assert counter.local_shape(coordinate, mesh) == ()
            assert sum(piece.numel for piece in counter.pieces(coordinate, mesh)) == 1
    assert sum(counter.owns(coordinate) for coordinate in coordinates) == 1


@given(st.integers(0, 100), st.integers(1, 20))
def test_even_ranges_tile_in_order(numel: int, parts: int) -> None:
    ranges = even_ranges(numel, parts)
    assert len(ranges) == parts
    assert [position for start, stop in ranges for position in range(start, stop)] == list(range(numel))
    assert all(stop - start <= -(-numel // parts) for start, stop in ranges)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_a_flat_range_is_few_boxes(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    mesh = MeshLayout((1, 1, 3, 1, 1))
    flat = FlatCut(("dp_shard",), (((0, start), (start, stop), (stop, numel)),))
    pieces = Placement(tuple(shape), flat=flat).pieces({**mesh.coordinate(0), "dp_shard": 1}, mesh)
    assert len(pieces) <= 2 * len(shape) - 1


def test_a_packed_query_key_value_weight_keeps_each_part_cut() -> None:
    mesh = MeshLayout((1, 1, 1, 1, 2))
    packed = DimCut(0, ("tp",), (((0, 2), (4, 5), (6, 7)), ((2, 4), (5, 6), (7, 8))))
    placement = Placement((8, 3), (packed,))
    full = torch.arange(24).reshape(8, 3)
    local = torch.zeros(placement.local_shape(mesh.coordinate(1), mesh), dtype=torch.int64)
    take_local(local, full, placement.pieces(mesh.coordinate(1), mesh))
    assert torch.equal(local, full[[2, 3, 5, 7]])


def test_reduce_sums_over_what_the_state_no_longer_has_open() -> None:
    compute = Placement((4,), partial=("dp_replicate", "shard", "tp"))
    state = Placement((4,), partial=("tp", "dp_replicate"))
    layout = ParameterLayout("w", (4,), compute, state)
    assert (layout.numel, layout.reduce_axes) == (4, ("shard",))


def test_a_flat_cut_has_no_rows() -> None:
    placement = Placement((4,), flat=FlatCut(("dp_shard",), (((0, 2), (2, 4)),)))
    with pytest.raises(AssertionError) as caught:
        placement.reduce_dims((0,))
    assert str(caught.value) == "a flat cut has no rows or columns: keep such a statistic replicated"
