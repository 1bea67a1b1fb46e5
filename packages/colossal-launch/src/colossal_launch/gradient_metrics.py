"""Statistics of gradients as numbers of a run, for its trackers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from colossal_core.gradient_statistics import ALL_UNITS, GradientStatistics

if TYPE_CHECKING:
    from colossal_launch.trackers import Metrics

ROOT_UNIT = "root"
"""What parameters that the model holds itself, in no module of it, are shown under."""


def gradient_metrics(statistics: Mapping[str, GradientStatistics]) -> Metrics:
    """`gradient_norm`, `gradient_max_abs`, `gradient_zero_fraction`, `gradient_non_finite` of all gradients, and `gradient_norm/UNIT`, ...

    Reads all numbers at once: one wait for the device.
    """
    names = [field.name for field in fields(GradientStatistics)]
    table = torch.stack(
        [torch.stack([getattr(found, name).double() for name in names]) for found in statistics.values()]
    ).tolist()
    metrics: dict[str, float | int | bool] = {}
    for unit, numbers in zip(statistics, table, strict=True):
        of = "" if unit == ALL_UNITS else f"/{unit or ROOT_UNIT}"
        for name, number in zip(names, numbers, strict=True):
            metrics[f"gradient_{name}{of}"] = int(number) if name == "non_finite" else number
    return metrics
