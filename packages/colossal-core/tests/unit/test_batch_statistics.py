"""BatchNorm makes samples depend on one another: on several data-parallel ranks it is a plan error, kept in evaluation mode it is not."""

from __future__ import annotations

import torch
from torch import nn

from colossal_core.config import parse_config
from colossal_core.errors import ConfigError
from colossal_core.examine import examine
from colossal_core.ops import build_op_table
from colossal_core.plan import make_plan
from colossal_core.plugins import discover


def problems_of(model: nn.Module, world_size: int) -> list[str]:
    plugins = discover(entry_points=())
    config = parse_config({"batch": {"global_size": 4}}, plugins.config_class())
    ops = build_op_table(plugins.ops(), "cpu", "float32")
    try:
        make_plan(config, examine(model), plugins.active(config), {}, ops, world_size=world_size)
    except ConfigError as error:
        return [str(problem) for problem in error.problems if problem.field == "model"]
    return []


def test_batch_norm_over_ranks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert problems_of(model, 2) == [
        "model: 1 normalises over the batch, of which each of the 2 ranks has another part: use GroupNorm or LayerNorm, or put it "
        "into evaluation mode before boosting (its statistics are then constants)"
    ]
    assert problems_of(model, 1) == []


def test_constant_statistics_are_no_statistics() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    assert problems_of(model, 2) == []
    assert model(torch.zeros(1, 2)).shape == (1, 2)
