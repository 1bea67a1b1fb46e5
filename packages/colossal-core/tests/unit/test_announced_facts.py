"""What a plugin announces is held to: an optimizer that is not elementwise, the states that it keeps, actions that no runner knows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.config import OptimizerConfig, parse_config
from colossal_core.elementwise import ADAMW, SGD_SPEC
from colossal_core.errors import ConfigError
from colossal_core.layout import FlatCut, ParameterLayout, Placement
from colossal_core.optimizers import build_optimizer
from colossal_core.plan import PlanDraft, initial_layouts
from colossal_core.plan_problems import program_problems
from colossal_core.plugins import discover
from colossal_core.program import Action, Program, plain_program
from colossal_core.shards import Shard

PLUGINS = discover(entry_points=())
CONFIG = parse_config({"batch": {"global_size": 2}}, PLUGINS.config_class())


class OneShard:
    """As much of a context and its parameter state as binding an optimizer reads: one parameter, cut over two ranks."""

    def __init__(self) -> None:
        cut = Placement((4,), flat=FlatCut(("dp_shard",), (((0, 2), (2, 4)),)))
        layout = ParameterLayout("weight", (4,), Placement((4,)), cut)
        master = nn.Parameter(torch.zeros(2))
        self.shards = {"weight": Shard(layout, master, master)}
        self.units: tuple[str, ...] = ()

    def parameter_state(self) -> OneShard:
        return self


def test_an_optimizer_that_needs_whole_parameters_is_refused_on_shards() -> None:
    specs = {"adamw": replace(ADAMW, on_shards="whole")}
    context: Any = OneShard()
    with pytest.raises(ConfigError) as caught:
        build_optimizer(None, CONFIG, specs, context)
    assert str(caught.value) == (
        "optimizer.name='adamw': it needs whole parameters, and the masters are sharded: use parallel.zero.stage: 0, or "
        "another optimizer"
    )


def test_states_by_the_config() -> None:
    assert ADAMW.state_elements(OptimizerConfig()) == 2
    assert SGD_SPEC.state_elements(OptimizerConfig(name="sgd")) == 0
    assert SGD_SPEC.state_elements(OptimizerConfig(name="sgd", momentum=0.9)) == 1
    assert ADAMW.state_bytes(OptimizerConfig(), 4) == 8
    assert ADAMW.state_bytes(OptimizerConfig(), 8) == 16
    assert ADAMW.state_bytes(OptimizerConfig(masters="compute"), 2) == 8
    assert ADAMW.state_bytes(OptimizerConfig(states="bf16"), 4) == 4
    assert ADAMW.state_bytes(OptimizerConfig(states="int8"), 4) == 2 + 2 * 4 / 256


def test_a_program_that_cannot_run_is_a_plan_error() -> None:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.mesh import MeshLayout
    from colossal_core.plan import BatchPlan

    layouts = initial_layouts(ModelAnatomy("Nothing", "own-loss", (), ()), MeshLayout())
    draft = PlanDraft(CONFIG, MeshLayout(), BatchPlan(2, 2, 2, 1), layouts, plain_program(1))
    assert list(program_problems(draft)) == []
    actions = (Action("forward"), Action("backward_input"), Action("backward_weight"))
    alone = draft.with_program(Program(1, (actions,)))
    assert [str(problem) for problem in program_problems(alone)] == [
        "program: cuts backward passes in two without stages, which nobody waits for: this is a mistake in a strategy's plan: report it"
    ]
    split = draft.with_program(Program(1, (actions,), stage_ranks=(0, 0)))
    assert list(program_problems(split)) == []
    for backend in ("inductor", "aot_eager", "eager"):
        assert list(program_problems(split.with_decisions("compile", {"layers.0": backend}))) == []
    compiled = split.with_decisions("compile", {"layers.0": "openxla"})
    assert [str(problem) for problem in program_problems(compiled)] == [
        "compile.backend='openxla': makes one backward graph of a block, and the schedule cuts backward passes in two: use inductor, "
        "aot_eager, eager, or a schedule with whole backward passes"
    ]
    wrong = Program(2, (plain_program(2).actions[0], (Action("forward", block="layers.0"),)))
    assert [str(problem) for problem in program_problems(draft.with_program(wrong))] == [
        "program: has actions for 2 pipeline ranks, and there are 1: this is a mistake in a strategy's plan: report it",
        "program: is for 2 microbatches, and a step has 1: this is a mistake in a strategy's plan: report it",
        "program: has actions on single blocks, or that gather or release (F0/layers.0), which the runner does not carry out: this is a "
        "mistake in a strategy's plan: report it",
    ]
    gathering = Program(1, ((Action("gather"), *plain_program(1).actions[0]),))
    assert [str(problem) for problem in program_problems(draft.with_program(gathering))] == [
        "program: has actions on single blocks, or that gather or release (G0), which the runner does not carry out: this is a mistake in "
        "a strategy's plan: report it",
    ]
