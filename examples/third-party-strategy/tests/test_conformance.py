"""The conformance suite, with what colossal-ema can do."""

from __future__ import annotations

from colossal_core.testing.suites import CheckpointSuite, StrategySuite, WrongConfig


class TestEma(StrategySuite):
    name = "ema"
    plugin = "ema"
    section = "ema"
    config = {"decay": 0.9}
    world_sizes = (1, 2, 4)
    observes_only = True
    others = {"parallel.zero": {"stage": 1}}
    wrong_configs = (
        WrongConfig({"decay": 1.0}, "ema.decay"),
        WrongConfig({"decay": 0.9, "every_steps": 1000}, "ema.every_steps"),
    )
    estimate_slack = 0.2  # shards of a tiny model are padded


class TestEmaIsSaved(CheckpointSuite):
    kinds = ("ema", "adamw.exp_avg")
    save_config = {"ema": {"decay": 0.9}, "parallel.zero": {"stage": 1}}
    load_config = {"ema": {"decay": 0.9}, "parallel.zero": {"stage": 0}}
    meshes = ((2, 1), (1, 2))
