"""The decisions of every stage as data: buckets, their flat layout, and who holds what."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_core.layout import ParameterLayout, Placement, fill_full
from colossal_core.mesh import MeshLayout
from colossal_core.plan import Gathering
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.parity import prepare
from colossal_zero.plan import ALIGNMENT, Bucket, assign_buckets, bucket_shape, replicated_layouts, sharded_layouts

NUMELS = st.lists(st.integers(1, 1000), min_size=1, max_size=12)


def layouts_of(numels: list[int], mesh: MeshLayout, *, frozen: int = -1) -> dict[str, ParameterLayout]:
    """Vectors of these sizes, whole on every rank, in blocks of three."""
    found = {}
    axes = tuple(axis for axis in ("dp_replicate", "dp_shard", "cp") if mesh.size(axis) > 1)
    for index, numel in enumerate(numels):
        trainable = index != frozen
        placement = Placement((numel,), replicated=axes, partial=axes if trainable else ())
        name, block = f"p{index}", f"blocks.{index // 3}"
        found[name] = ParameterLayout(name, (numel,), placement, placement, block=block, trainable=trainable)
    return found


@given(NUMELS, st.integers(1, 9))
def test_shards_of_a_bucket_hold_every_element_once(numels: list[int], num_shards: int) -> None:
    shape = bucket_shape(numels, num_shards)
    assert shape.length == shape.shard_length * num_shards
    assert shape.shard_length % ALIGNMENT == 0
    assert all(offset % ALIGNMENT == 0 for offset in shape.offsets)
    assert all(start + numel <= stop for (start, stop), numel in zip(pairwise(shape.offsets), numels[:-1], strict=True))
    assert shape.offsets[-1] + numels[-1] <= shape.length
    for position, numel in enumerate(numels):
        held = [shape.held(position, shard) for shard in range(num_shards)]
        assert all(0 <= low <= high <= numel for low, high in held)
        assert [element for low, high in held for element in range(low, high)] == list(range(numel))


@given(NUMELS, st.integers(1, 9))
def test_a_shard_holds_what_lies_in_its_range_of_the_buffer(numels: list[int], num_shards: int) -> None:
    shape = bucket_shape(numels, num_shards)
    for shard in range(num_shards):
        for position, offset in enumerate(shape.offsets):
            low, high = shape.held(position, shard)
            if high > low:
                assert shard * shape.shard_length <= offset + low
                assert offset + high <= (shard + 1) * shape.shard_length


@given(NUMELS, st.integers(1, 3000), st.integers(-1, 11))
def test_every_trained_parameter_is_in_one_bucket_in_reverse_order(numels: list[int], size: int, frozen: int) -> None:
    layouts = layouts_of(numels, MeshLayout(), frozen=frozen)
    trained = [layout for layout in layouts.values() if layout.trainable]
    buckets = assign_buckets(trained, ["blocks.0", "blocks.1"], size)
    names = [name for bucket in buckets for name in bucket.names]
    assert names == [name for name in reversed(layouts) if layouts[name].trainable]
    inside = {"blocks.0", "blocks.1"}
    for bucket in buckets:
        assert len({layouts[name].block in inside for name in bucket.names}) == 1
        assert len(bucket.names) == 1 or sum(layouts[name].numel for name in bucket.names) <= size


@given(NUMELS, st.sampled_from([(1, 1, 2, 1, 1), (1, 2, 2, 1, 1), (1, 1, 3, 2, 1), (1, 2, 1, 2, 1)]))
@settings(max_examples=30)
def test_sharded_layouts_cover_every_tensor(numels: list[int], sizes: tuple[int, int, int, int, int]) -> None:
    mesh = MeshLayout(sizes)
    layouts = layouts_of(numels, mesh)
    buckets = assign_buckets(layouts.values(), ["blocks.0"], 1500)
    for name, layout in sharded_layouts(layouts, buckets, mesh).items():
        truth = torch.arange(1, layout.numel + 1)
        full = torch.zeros_like(truth)
        for rank in range(mesh.world_size):
            coordinate = mesh.coordinate(rank)
            pieces = layout.state.pieces(coordinate, mesh)
            held = sum(piece.numel for piece in pieces)
            assert layout.state.local_shape(coordinate, mesh) == (held,)
            if layout.state.owns(coordinate):
                local = torch.cat([truth[piece.box] for piece in pieces]) if pieces else truth[:0]
                before = full.clone()
                fill_full(full, local, pieces)
                assert int((full != before).sum()) == held, f"{name} is held twice"
        assert torch.equal(full, truth)
        assert layout.state.partial == tuple(axis for axis in layout.compute.partial if axis == "dp_replicate")
        assert set(layout.reduce_axes) == {axis for axis in ("dp_shard", "cp") if mesh.size(axis) > 1}


def test_stage_0_keeps_whole_states_and_leaves_frozen_parameters_alone() -> None:
    mesh = MeshLayout((1, 2, 2, 1, 1))
    layouts = layouts_of([5, 6], mesh, frozen=1)
    changed = replicated_layouts(layouts)
    assert list(changed) == ["p0"]
    assert changed["p0"].state.flat is None
    assert changed["p0"].reduce_axes == ("dp_shard",)
    assert changed["p0"].state.partial == ("dp_replicate",)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_a_bucket_is_padded_to_whole_aligned_shards(num_shards: int) -> None:
    shape = bucket_shape([1, ALIGNMENT + 1], num_shards)
    assert shape.offsets == (0, ALIGNMENT)
    assert shape.length == math.ceil(3 / num_shards) * num_shards * ALIGNMENT


def test_buckets_never_mix_blocks_with_the_rest() -> None:
    layouts = layouts_of([10] * 6, MeshLayout())
    expected = (Bucket(("p5", "p4", "p3")), Bucket(("p2", "p1", "p0")))
    assert assign_buckets(layouts.values(), ["blocks.0"], 10**6) == expected


@given(NUMELS, st.integers(1, 3000))
def test_whole_blocks_are_one_bucket_each_whatever_their_size(numels: list[int], size: int) -> None:
    layouts = layouts_of(numels, MeshLayout())
    buckets = assign_buckets(layouts.values(), ["blocks.0", "blocks.1"], size, whole_blocks=True)
    units = [{layouts[name].block for name in bucket.names} for bucket in buckets]
    for block in ("blocks.0", "blocks.1"):
        assert [found for found in units if block in found] == [{block}] * any(
            x.block == block for x in layouts.values()
        )
    assert sorted(name for bucket in buckets for name in bucket.names) == sorted(layouts)


def test_a_stages_buckets_and_policy_are_in_the_plan() -> None:
    zero = {"stage": 3, "keep_parameters": "microbatch", "prefetch": 2}
    config = {"batch": {"global_size": 4}, "precision": "bf16", "parallel": {"zero": {**zero, "reduce_dtype": "bf16"}}}
    plan = prepare(RunSpec(config, TinyModel(TinyOptions(frozen=True)), TokenBatches(), task="causal-lm"), 2).plan
    assert plan.gathering == Gathering("microbatch", 2)
    buckets: Any = plan.data["zero"]["buckets"]
    assert [len(bucket) for bucket in buckets] == [2, 12, 12, 1, 1]
    assert buckets[-1] == ["positions.weight"], "frozen parameters have a bucket of their own"
    expected = (
        "zero: stage 3, 5 buckets, gradients sent in bf16, parameters gathered for each microbatch, 2 blocks ahead"
    )
    assert expected in plan.notes
    assert all(layout.state.flat is not None for layout in plan.layouts.values())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_below_stage_3_nothing_is_gathered_in_a_step(stage: int) -> None:
    config = {"batch": {"global_size": 4}, "parallel": {"zero": {"stage": stage}}}
    plan = prepare(RunSpec(config, TinyModel(TinyOptions(frozen=True)), TokenBatches(), task="causal-lm"), 2).plan
    assert plan.gathering == Gathering("always")
    assert plan.layouts["positions.weight"].state.flat is None, "frozen parameters stay whole"
