"""Tensor parallelism through core's conformance kit."""

from __future__ import annotations

import pytest

pytest.importorskip("colossal_zero")

from colossal_core.testing.models import TinyModel, TinyOptions
from colossal_core.testing.suites import StrategySuite, WrongConfig

MODEL = TinyModel(TinyOptions(hidden_size=16, dropout=0.0))
"""A model in plain torch: heads that lie side by side in a fused projection, a tied head, and 53 words."""


class TestTensor(StrategySuite):
    name = "tensor"
    plugin = "tensor"
    section = "parallel.tensor"
    config = {"size": 2}
    axes = ("tp",)
    world_sizes = (2, 4)
    model = MODEL
    estimate_slack = 0.2  # flat buckets are padded; the 53 words are cut into 27 and 26
    wrong_configs = (
        WrongConfig({"size": 2, "mode": "2d"}, "parallel.tensor.mode", world_size=2),
        WrongConfig({"size": 3}, "parallel.tensor.size", world_size=3),
        WrongConfig({"size": 2}, "parallel", world_size=3),
    )
