"""The learning rate over the steps, as a factor of each group's peak."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from colossal_core.errors import Problem

if TYPE_CHECKING:
    import torch

    from colossal_core.config import SchedulerConfig, TrainConfig
    from colossal_core.optimizers import ClippingOptimizer, OptimizerFactory

_PAIRS = "pairs of key and value"


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


def own_schedule_problems(
    config: TrainConfig,
    optimizer: torch.optim.Optimizer | OptimizerFactory | None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
) -> Iterable[Problem]:
    """What would be ignored, or cannot be done, of a learning-rate scheduler and the `scheduler` section beside a user's optimizer."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    if optimizer is not None and config.was_set("scheduler"):
        reason = "is set beside an optimizer that was handed to boost, whose rates are its own"
        yield Problem("scheduler", reason, "hand over lr_scheduler, and remove it here")
    if scheduler is None:
        return
    if scheduler.optimizer is not optimizer:
        reason = "schedules another optimizer than the instance handed to boost"
        yield Problem("lr_scheduler", reason, "hand over the optimizer that it was built on")
    if isinstance(scheduler, ReduceLROnPlateau):
        reason = "ReduceLROnPlateau needs a metric at each step, which core does not have"
        remedy = "leave it out, call its step(metric) after an evaluation, and save it by trained.attach('plateau', scheduler)"
        yield Problem("lr_scheduler", reason, remedy)


class SavedScheduler:
    """The state of a torch scheduler as JSON, whose mappings have texts for keys: MultiStepLR counts its milestones by step."""

    def __init__(self, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
        self._scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = _encoded(self._scheduler.state_dict())
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(_decoded(state_dict, self._scheduler.state_dict()))


def _encoded(value: Any) -> Any:
    if isinstance(value, Mapping):
        items = [(key, _encoded(item)) for key, item in value.items()]
        return dict(items) if all(isinstance(key, str) for key in value) else {_PAIRS: [list(item) for item in items]}
    return [_encoded(item) for item in value] if isinstance(value, list | tuple) else value


def _decoded(value: Any, like: Any) -> Any:
    """like: the same place in the state of the scheduler that takes it, which knows the kind of a mapping."""
    if isinstance(value, Mapping):
        if list(value) == [_PAIRS]:
            made = dict(value[_PAIRS])
            return Counter(made) if isinstance(like, Counter) else made
        return {
            key: _decoded(item, like.get(key) if isinstance(like, Mapping) else None) for key, item in value.items()
        }
    if isinstance(value, list):
        places = like if isinstance(like, list | tuple) and len(like) == len(value) else [None] * len(value)
        return [_decoded(item, place) for item, place in zip(value, places, strict=True)]
    return value
