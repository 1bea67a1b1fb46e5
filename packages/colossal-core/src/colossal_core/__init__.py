"""The contract that every strategy keeps to, and the one training step.

Read the files in the order of a step: config -> plugins -> examine -> plan -> mesh, layout -> wrap -> step (loss, gradients, optimizers) ->
checkpoint. What is exported here is for authors of plugins, and is versioned by `hookspecs.PLUGIN_API`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy, ParameterFact
    from colossal_core.collectives import Collectives, Handle, SingleProcess
    from colossal_core.config.sections import Section
    from colossal_core.config.tree import TrainConfig
    from colossal_core.errors import CheckpointError, ColossalError, ConfigError, PluginError, Problem
    from colossal_core.estimate import EstimateTable, HardwareProfile
    from colossal_core.gradient_statistics import GradientStatistics
    from colossal_core.hookspecs import PLUGIN_API, hookimpl
    from colossal_core.layout import ParameterLayout, Piece, Placement
    from colossal_core.mesh import MeshLayout
    from colossal_core.ops.table import OpImplementation, OpTable
    from colossal_core.optimizer_state import StateTensor
    from colossal_core.optimizers import OptimizerContext, OptimizerSpec
    from colossal_core.plan import Plan, PlanDraft, make_plan
    from colossal_core.plugins import Plugins, discover
    from colossal_core.shards import ParameterState, Shard
    from colossal_core.step import EvalResult, StepResult
    from colossal_core.strategy import ApplyContext, Phase, StepView, Strategy, StrategySpec
    from colossal_core.trained import Trained
    from colossal_core.wrap import Parts

_MODULES = {
    "ApplyContext": "strategy",
    "CheckpointError": "errors",
    "Collectives": "collectives",
    "ColossalError": "errors",
    "ConfigError": "errors",
    "EstimateTable": "estimate",
    "EvalResult": "step",
    "GradientStatistics": "gradient_statistics",
    "Handle": "collectives",
    "HardwareProfile": "estimate",
    "MeshLayout": "mesh",
    "ModelAnatomy": "anatomy",
    "OpImplementation": "ops.table",
    "OpTable": "ops.table",
    "OptimizerContext": "optimizers",
    "OptimizerSpec": "optimizers",
    "PLUGIN_API": "hookspecs",
    "ParameterFact": "anatomy",
    "ParameterLayout": "layout",
    "ParameterState": "shards",
    "Parts": "wrap",
    "Phase": "strategy",
    "Piece": "layout",
    "Placement": "layout",
    "Plan": "plan",
    "PlanDraft": "plan",
    "PluginError": "errors",
    "Plugins": "plugins",
    "Problem": "errors",
    "Section": "config.sections",
    "Shard": "shards",
    "SingleProcess": "collectives",
    "StateTensor": "optimizer_state",
    "StepResult": "step",
    "StepView": "strategy",
    "Strategy": "strategy",
    "StrategySpec": "strategy",
    "TrainConfig": "config.tree",
    "Trained": "trained",
    "discover": "plugins",
    "hookimpl": "hookspecs",
    "make_plan": "plan",
}

__all__ = [
    "PLUGIN_API",
    "ApplyContext",
    "CheckpointError",
    "Collectives",
    "ColossalError",
    "ConfigError",
    "EstimateTable",
    "EvalResult",
    "GradientStatistics",
    "Handle",
    "HardwareProfile",
    "MeshLayout",
    "ModelAnatomy",
    "OpImplementation",
    "OpTable",
    "OptimizerContext",
    "OptimizerSpec",
    "ParameterFact",
    "ParameterLayout",
    "ParameterState",
    "Parts",
    "Phase",
    "Piece",
    "Placement",
    "Plan",
    "PlanDraft",
    "PluginError",
    "Plugins",
    "Problem",
    "Section",
    "Shard",
    "SingleProcess",
    "StateTensor",
    "StepResult",
    "StepView",
    "Strategy",
    "StrategySpec",
    "TrainConfig",
    "Trained",
    "discover",
    "hookimpl",
    "make_plan",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
