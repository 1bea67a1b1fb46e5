"""The mesh against brute force over all ranks: coordinates, groups of base, folded and factored axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_core.mesh import BASE_AXES, WORLD, DerivedAxis, MeshLayout

EXPERT_SOURCES = ("dp_shard", "cp", "tp")


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


@st.composite
def meshes(draw: st.DrawFn) -> MeshLayout:
    """A mesh of at most 16 ranks with the experts' view, and with tp in two factors, the first of which is factored again."""
    sizes = [draw(st.sampled_from([1, 2, 4, 8]))]
    for _ in BASE_AXES[1:]:
        sizes.append(draw(st.integers(1, max(1, min(4, 16 // math.prod(sizes))))))
    tp, cp, dp_shard, dp_replicate, pp = sizes
    mesh = MeshLayout((pp, dp_replicate, dp_shard, cp, tp))
    experts = mesh.size(EXPERT_SOURCES)
    ep = draw(st.sampled_from(divisors(experts)))
    row = draw(st.sampled_from(divisors(mesh.size("tp"))))
    outer = draw(st.sampled_from(divisors(row)))
    for axis in (
        DerivedAxis("edp", EXPERT_SOURCES, experts // ep, ep),
        DerivedAxis("ep", EXPERT_SOURCES, ep),
        DerivedAxis("tp_row", ("tp",), row, mesh.size("tp") // row),
        DerivedAxis("tp_column", ("tp",), mesh.size("tp") // row),
        DerivedAxis("tp_outer", ("tp_row",), outer, row // outer),
        DerivedAxis("tp_inner", ("tp_row",), row // outer),
        DerivedAxis("everything", ("pp", "dp", "cp", "tp"), mesh.world_size),
    ):
        mesh = mesh.with_axis(axis)
    return mesh


# Axes that say everything about a rank together; a group over some of them is that of equal coordinates along the others.
VIEWS = (
    BASE_AXES,
    ("pp", "dp", "cp", "tp"),
    ("pp", "dp_replicate", "shard", "tp"),
    ("pp", "dp_replicate", "edp", "ep"),
    ("pp", "dp", "cp", "tp_row", "tp_column"),
    ("pp", "dp_replicate", "shard", "tp_outer", "tp_inner", "tp_column"),
    ("everything",),
)


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Some axes of a view, in any order, and the rest of the view."""
    view = draw(st.sampled_from(VIEWS))
    order = draw(st.permutations(view))
    count = draw(st.integers(1, len(view)))
    return tuple(order[:count]), tuple(order[count:])


@given(meshes())
def test_ranks_and_coordinates_are_one_to_one(mesh: MeshLayout) -> None:
    coordinates = [mesh.coordinate(rank) for rank in range(mesh.world_size)]
    assert [mesh.rank(coordinate) for coordinate in coordinates] == list(range(mesh.world_size))
    for view in VIEWS:
        indices = {mesh.flat_index(coordinate, view) for coordinate in coordinates}
        assert indices == set(range(mesh.world_size))
    for coordinate in coordinates:
        assert set(coordinate) == set(mesh.axis_names)
        assert all(0 <= coordinate[axis] < mesh.size(axis) for axis in mesh.axis_names)
        assert coordinate["dp"] == mesh.flat_index(coordinate, ("dp_replicate", "dp_shard"))
        assert coordinate["shard"] == mesh.flat_index(coordinate, ("dp_shard", "cp"))
        assert coordinate["tp"] == mesh.flat_index(coordinate, ("tp_row", "tp_column"))
        assert mesh.flat_index(coordinate, ("edp", "ep")) == mesh.flat_index(coordinate, EXPERT_SOURCES)


@given(meshes(), views())
def test_groups_are_those_of_brute_force(mesh: MeshLayout, view: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    axes, others = view
    coordinates = [mesh.coordinate(rank) for rank in range(mesh.world_size)]
    for rank in range(mesh.world_size):
        alike = [
            other
            for other in range(mesh.world_size)
            if all(coordinates[other][axis] == coordinates[rank][axis] for axis in others)
        ]
        expected = tuple(sorted(alike, key=lambda other: mesh.flat_index(coordinates[other], axes)))
        assert mesh.group(rank, axes) == expected
        assert expected[mesh.flat_index(coordinates[rank], axes)] == rank


@given(meshes(), views())
def test_groups_part_the_ranks(mesh: MeshLayout, view: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    axes, _ = view
    groups = mesh.groups(axes)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
    assert {len(group) for group in groups} == {mesh.size(axes)}
    assert [min(group) for group in groups] == sorted(min(group) for group in groups)


@given(meshes())
def test_the_world_is_one_group_in_order(mesh: MeshLayout) -> None:
    assert mesh.groups(WORLD) == (tuple(range(mesh.world_size)),)
    assert mesh.groups("everything") == mesh.groups(WORLD)


def test_one_rank_is_every_group() -> None:
    mesh = MeshLayout()
    assert (mesh.world_size, mesh.group(0, WORLD), mesh.groups("shard")) == (1, (0,), ((0,),))
    assert set(mesh.coordinate(0).values()) == {0}
    assert mesh.group(0, ("shard", "dp_shard")) == (0,)


def test_tensor_ranks_are_neighbours_and_pipeline_ranks_far_apart() -> None:
    mesh = MeshLayout((2, 1, 2, 1, 2))
    assert mesh.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.groups("dp_shard") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.groups("pp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert mesh.group(0, ("tp", "dp_shard")) == (0, 2, 1, 3)


def test_a_factor_is_factored_further() -> None:
    mesh = (
        MeshLayout((1, 1, 1, 1, 8))
        .with_axis(DerivedAxis("row", ("tp",), 4, 2))
        .with_axis(DerivedAxis("column", ("tp",), 2))
    )
    mesh = mesh.with_axis(DerivedAxis("outer", ("row",), 2, 2)).with_axis(DerivedAxis("inner", ("row",), 2))
    assert mesh.groups("outer") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert mesh.groups("inner") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.group(5, ("column", "outer")) == (0, 4, 1, 5)


def test_experts_take_tensor_ranks_first() -> None:
    mesh = MeshLayout((1, 1, 4, 1, 2))
    mesh = mesh.with_axis(DerivedAxis("edp", EXPERT_SOURCES, 2, 4)).with_axis(DerivedAxis("ep", EXPERT_SOURCES, 4))
    assert mesh.groups("ep") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert mesh.groups("edp") == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_thousands_of_ranks_take_no_time() -> None:
    mesh = MeshLayout((8, 2, 32, 2, 8))
    mesh = mesh.with_axis(DerivedAxis("ep", EXPERT_SOURCES, 64)).with_axis(DerivedAxis("edp", EXPERT_SOURCES, 8, 64))
    assert len(mesh.group(4095, "edp")) == 8
    assert mesh.group(4095, ("pp", "dp_replicate", "edp", "ep")) == tuple(range(8192))[: mesh.world_size]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("tp", "tp_row"), "axes ('tp', 'tp_row') do not form a group: [0, 1, 1, 0]"),
        (("ep", "tp"), "axes ('ep', 'tp') do not form a group: they cut ['dp_shard', 'cp', 'tp', 'tp'] in two ways"),
    ],
)
def test_axes_that_overlap_are_no_group(axes: Sequence[str], message: str) -> None:
    mesh = MeshLayout((1, 1, 2, 1, 2)).with_axis(DerivedAxis("ep", EXPERT_SOURCES, 4))
    mesh = mesh.with_axis(DerivedAxis("tp_row", ("tp",), 2))
    with pytest.raises(AssertionError) as caught:
        mesh.group(0, axes)
    assert str(caught.value).split("\n")[0] == message


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (DerivedAxis("dp", ("tp",), 2), "axis dp exists"),
        (DerivedAxis("third", ("tp",), 3), f"{DerivedAxis('third', ('tp',), 3)} does not divide 4"),
        (
            DerivedAxis("mixed", ("half", "cp"), 2),
            "axis mixed: half is a factor, and a factor can only be factored further by itself",
        ),
        (
            DerivedAxis("twice", ("dp", "shard"), 4),
            "axis twice has one of ['dp_replicate', 'dp_shard', 'dp_shard', 'cp'] twice",
        ),
    ],
)
def test_axes_that_cannot_be_are_refused(axis: DerivedAxis, message: str) -> None:
    mesh = MeshLayout((1, 1, 2, 2, 4)).with_axis(DerivedAxis("half", ("tp",), 2, 2))
    with pytest.raises(AssertionError) as caught:
        mesh.with_axis(axis)
    assert str(caught.value).split("\n")[0] == message
