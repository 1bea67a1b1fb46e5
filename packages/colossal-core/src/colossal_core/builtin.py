"""Core's own plugin: what is there when no other package is installed. It uses the same hooks as everyone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from colossal_core.hookspecs import PLUGIN_API, hookimpl

if TYPE_CHECKING:
    from colossal_core.ops import OpImplementation
    from colossal_core.optimizers import OptimizerSpec
    from colossal_core.strategy import StrategySpec

COLOSSAL_PLUGIN_API = PLUGIN_API


@hookimpl
def colossal_strategies() -> Sequence[StrategySpec]:
    from colossal_core.compiling import compile_spec
    from colossal_core.recompute import recompute_spec

    return [recompute_spec(), compile_spec()]


@hookimpl
def colossal_ops() -> Sequence[OpImplementation]:
    from colossal_core.ops.reference import reference_ops, torch_ops

    return (*reference_ops(), *torch_ops())


@hookimpl
def colossal_optimizers() -> Sequence[OptimizerSpec]:
    from colossal_core.elementwise import ADAMW, SGD_SPEC

    return [ADAMW, SGD_SPEC]
