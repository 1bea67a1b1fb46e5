"""Pipeline parallelism through core's conformance kit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("colossal_zero")

from colossal_core.errors import ConfigError
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TinyModel, TinyOptions
from colossal_core.testing.parity import prepare
from colossal_core.testing.suites import StrategySuite, WrongConfig

MODEL = TinyModel(TinyOptions(hidden_size=16, num_blocks=4, dropout=0.0))
"""A model in plain torch, with a head that is tied to its first table: both ends of the pipeline hold it."""


class TestPipeline(StrategySuite):
    name = "pipeline"
    plugin = "pipeline"
    section = "parallel.pipeline"
    config = {"size": 2}
    axes = ("pp",)
    world_sizes = (2, 4)
    model = MODEL
    estimate_slack = 0.05
    wrong_configs = (
        WrongConfig({"size": 2, "schedule": "zigzag"}, "parallel.pipeline.schedule", world_size=2),
        WrongConfig({"size": 2, "schedule": "1f1b", "chunks": 2}, "parallel.pipeline.chunks", world_size=2),
        WrongConfig({"size": 8}, "parallel.pipeline.size", world_size=8),
        WrongConfig({"size": 2, "blocks": [1, 2]}, "parallel.pipeline.blocks", world_size=2),
        WrongConfig({"size": 2}, "parallel", world_size=3),
    )


def run(overrides: Mapping[str, Any]) -> RunSpec:
    return TestPipeline().spec().with_overrides(overrides)


TWO_RANKS = "stage_ranks: [0, 1]\nactions: [[F0.0, B0.0, F0.1, B0.1], [F1.0, B1.0, F1.1, B1.1]]\n"
KNOWN = "gpipe, 1f1b, interleaved, looped-bfs, zb-h1, zb-h2, zbv, dualpipev"
MESSAGES: tuple[tuple[Mapping[str, Any], int, str], ...] = (
    (
        {"size": 2, "schedule": "zigzag"},
        2,
        f"parallel.pipeline.schedule='zigzag': is no schedule that is known: use one of {KNOWN}, or the path of a .yaml or .json file",
    ),
    (
        {"size": 2, "chunks": 2},
        2,
        "parallel.pipeline.chunks=2: schedule 1f1b has 1 stage on each rank: give 1, or choose a schedule that takes 2 (interleaved, "
        "looped-bfs, zbv, dualpipev)",
    ),
    (
        {"size": 2, "schedule": "zbv", "chunks": 1},
        2,
        "parallel.pipeline.chunks=1: schedule zbv has 2 stages on each rank: give 2, or choose a schedule that takes 1 (gpipe, 1f1b, "
        "zb-h1, zb-h2)",
    ),
    (
        {"size": 4, "schedule": "interleaved"},
        4,
        "parallel.pipeline.size=4: makes 8 stages, and TinyLM runs 4 blocks: use at most 4 stages",
    ),
    (
        {"size": 2, "blocks": [1, 2]},
        2,
        "parallel.pipeline.blocks=[1, 2]: names 3 blocks in 2 stages, and there are 4 blocks and 2 stages: give 2 numbers that add up to 4",
    ),
    (
        {"size": 4, "schedule": "FILE"},
        4,
        "parallel.pipeline.schedule='FILE': is for 2 ranks, and parallel.pipeline.size is 4: write one list of actions for each rank",
    ),
    (
        {"size": 2, "chunks": 2, "schedule": "FILE"},
        2,
        "parallel.pipeline.schedule='FILE': has 2 stages, and 2 ranks with 2 chunks have 4: leave chunks out",
    ),
    (
        {"size": 2, "schedule": "none.yaml"},
        2,
        "parallel.pipeline.schedule='none.yaml': there is no such file: give the path of a YAML or JSON file",
    ),
)


@pytest.mark.parametrize(("values", "world_size", "expected"), MESSAGES)
def test_what_cannot_be_had_is_explained(
    values: Mapping[str, Any], world_size: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "two.yaml"
    path.write_text(TWO_RANKS)
    named = {key: str(path) if value == "FILE" else value for key, value in values.items()}
    spec = run({"batch": {"global_size": 2, "micro_size": 1}, "parallel.pipeline": named})
    with pytest.raises(ConfigError) as raised:
        prepare(spec, world_size)
    assert str(raised.value).replace(str(path), "FILE") == expected


def test_a_file_is_for_one_number_of_microbatches(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(TWO_RANKS)
    named = {"size": 2, "schedule": str(path)}
    spec = run({"batch": {"global_size": 3, "micro_size": 1}, "parallel.pipeline": named})
    with pytest.raises(ConfigError) as raised:
        prepare(spec, 2)
    assert str(raised.value) == (
        f"parallel.pipeline.schedule={str(path)!r}: is for 2 microbatches, and a step has 3: change batch.micro_size or batch.global_size, "
        "or the file"
    )
