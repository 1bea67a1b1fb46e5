"""A tied embedding across pipeline stages is an axis of its own: the ranks of those stages, and nobody else."""

from __future__ import annotations

import pytest

from colossal_core.layout import Placement
from colossal_core.mesh import MeshLayout, SharingSet


@pytest.fixture
def mesh() -> MeshLayout:
    """Four stages, two data-parallel ranks each; the first and the last stage share a parameter."""
    return MeshLayout((4, 1, 2, 1, 1)).with_sharing(SharingSet("shared:wte", (0, 3)))


def test_its_group_are_the_ranks_of_its_stages(mesh: MeshLayout) -> None:
    assert mesh.size("shared:wte") == 2
    assert mesh.group(0, "shared:wte") == (0, 6)
    assert mesh.group(7, "shared:wte") == (1, 7)
    assert mesh.group(6, ("shared:wte", "dp_shard")) == (0, 1, 6, 7)


def test_it_may_stand_at_any_place_of_a_group() -> None:
    mesh = MeshLayout((4, 2, 1, 1, 2)).with_sharing(SharingSet("shared:wte", (0, 3)))
    assert mesh.group(15, ("dp_replicate", "shared:wte")) == (1, 13, 3, 15)
    assert mesh.group(15, ("dp_replicate", "shared:wte", "tp")) == (0, 1, 12, 13, 2, 3, 14, 15)
    assert mesh.group(0, ("tp", "dp_replicate", "shared:wte")) == (0, 12, 2, 14, 1, 13, 3, 15)
    for axes in (("dp_replicate", "shared:wte", "tp"), ("shared:wte", "tp")):
        members = mesh.group(15, axes)
        assert [mesh.flat_index(mesh.coordinate(rank), axes) for rank in members] == list(range(len(members)))


def test_it_does_not_go_with_pp_and_not_off_its_stages(mesh: MeshLayout) -> None:
    with pytest.raises(AssertionError) as caught:
        mesh.group(0, ("pp", "shared:wte"))
    assert str(caught.value) == "axes ('pp', 'shared:wte') do not form a group: they cut pp in two ways"
    with pytest.raises(AssertionError) as caught:
        mesh.group(2, ("dp_shard", "shared:wte"))
    assert str(caught.value) == "rank 2 is on none of the stages of SharingSet(name='shared:wte', stages=(0, 3))"


def test_only_its_stages_have_a_coordinate(mesh: MeshLayout) -> None:
    assert [mesh.coordinate(rank).get("shared:wte") for rank in range(8)] == [0, 0, None, None, None, None, 1, 1]


def test_the_lowest_stage_owns_what_is_shared(mesh: MeshLayout) -> None:
    placement = Placement((4,), replicated=("dp_shard",), present=(("pp", (0, 3)),))
    assert [rank for rank in range(8) if placement.owns(mesh.coordinate(rank))] == [0]
    assert [rank for rank in range(8) if placement.pieces(mesh.coordinate(rank), mesh)] == [0, 1, 6, 7]
