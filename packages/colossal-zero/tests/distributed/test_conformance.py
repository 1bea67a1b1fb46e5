"""Every stage through core's conformance kit."""

from __future__ import annotations

from colossal_core.testing.suites import CheckpointSuite, StrategySuite, WrongConfig

AXES = ("dp_replicate", "dp_shard", "cp")
SMALL = 9000
"""Bytes: the tiny model then has several buckets, and parameters that are larger than one."""


class TestStage0(StrategySuite):
    name = "zero"
    plugin = "zero"
    section = "parallel.zero"
    config = {"stage": 0, "bucket_bytes": SMALL}
    axes = AXES
    world_sizes = (1, 4)
    wrong_configs = (
        WrongConfig({"stage": 2, "prefetch": 1}, "parallel.zero.prefetch"),
        WrongConfig({"stage": 1, "replicate": 3}, "parallel", world_size=2),
    )


class TestStage1(StrategySuite):
    name = "zero"
    plugin = "zero"
    section = "parallel.zero"
    config = {"stage": 1, "bucket_bytes": SMALL}
    axes = AXES
    world_sizes = (1, 4)
    estimate_slack = 0.2  # of a small bucket the padding is no small part, and the last rank has it all


class TestStage2(StrategySuite):
    name = "zero"
    plugin = "zero"
    section = "parallel.zero"
    config = {"stage": 2, "bucket_bytes": SMALL}
    axes = AXES
    world_sizes = (1, 4)
    estimate_slack = 0.2


class TestStage3(StrategySuite):
    name = "zero"
    plugin = "zero"
    section = "parallel.zero"
    config = {"stage": 3, "bucket_bytes": SMALL}
    axes = AXES
    world_sizes = (1, 4)
    estimate_slack = 0.2
    wrong_configs = (WrongConfig({"stage": 3, "reduce_dtype": "bf16"}, "parallel.zero.reduce_dtype"),)


class TestHybridSharding(StrategySuite):
    name = "zero"
    plugin = "zero"
    section = "parallel.zero"
    config = {"stage": 1, "replicate": 2, "bucket_bytes": SMALL}
    axes = AXES
    world_sizes = (4,)
    estimate_slack = 0.2


class TestShardedAdamWIsSaved(CheckpointSuite):
    """Written by stage 1 on four ranks, read by stage 0 on two, and the other way round."""

    kinds = ("adamw.exp_avg", "adamw.exp_avg_sq", "adamw.step")
    save_config = {"parallel.zero": {"stage": 1, "bucket_bytes": SMALL}}
    load_config = {"parallel.zero": {"stage": 0}}
    meshes = ((4, 2), (2, 4))


class TestHybridShardingOfParameters(StrategySuite):
    name = "zero"
    plugin = "zero"
    section = "parallel.zero"
    config = {"stage": 3, "replicate": 2, "bucket_bytes": SMALL}
    axes = AXES
    world_sizes = (4,)
    estimate_slack = 0.2


class TestRecomputeOverStage3(StrategySuite):
    name = "recompute"
    plugin = "builtin"
    section = "recompute"
    config = {"mode": "full"}
    others = {"parallel.zero": {"stage": 3}}
    world_sizes = (2,)


class TestRecomputeOverStage1(StrategySuite):
    """Core's own strategies meet zero in the plan alone."""

    name = "recompute"
    plugin = "builtin"
    section = "recompute"
    config = {"mode": "full"}
    others = {"parallel.zero": {"stage": 1, "bucket_bytes": SMALL}}
    world_sizes = (2,)
