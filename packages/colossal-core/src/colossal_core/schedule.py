"""The learning rate over the steps, as a factor of each group's peak."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_core.config import SchedulerConfig
    from colossal_core.optimizers import ClippingOptimizer


def factor_at(config: SchedulerConfig, step: int, num_steps: int) -> float:
    """Factor of the peak for the step with index `step` (0 for the first): linear warm-up, then the shape down to `min_factor`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name == "constant":
        return 1.0
    length = max(num_steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps + 1) / length, 1.0)
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.name == "cosine" else 1.0 - progress
    return config.min_factor + (1.0 - config.min_factor) * shape


def rates_from_config(optimizer: ClippingOptimizer, config: SchedulerConfig, num_steps: int) -> Callable[[int], None]:
    """Sets every group's rate before a step, as a function of the step alone: nothing to save, nothing to restore."""
    peaks = [group["lr"] for group in optimizer.param_groups]

    def set_rates(step: int) -> None:
        factor = factor_at(config, step, num_steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor

    return set_rates
