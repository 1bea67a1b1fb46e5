"""The hooks that a plugin may implement, in the order in which they are called. Entry-point group: `colossal.plugins`.

An entry point names a module or an object with functions marked `@hookimpl`, and a constant `COLOSSAL_PLUGIN_API = (major, minor)`: the
version of this contract that it was written for. Implementations take no default values (their meaning changed between pluggy 1.6
and 1.7, so they are refused at load).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import torch

    from colossal_core.benchmarks import Benchmark
    from colossal_core.collectives import Collectives
    from colossal_core.mesh import MeshLayout
    from colossal_core.ops import OpImplementation
    from colossal_core.optimizers import OptimizerSpec
    from colossal_core.strategy import StrategySpec

PLUGIN_API = (0, 1)
"""This core's version of the plugin contract: a plugin with the same major and a minor not above it is loaded."""

ENTRY_POINT_GROUP = "colossal.plugins"
hookspec = pluggy.HookspecMarker("colossal")
hookimpl = pluggy.HookimplMarker("colossal")


@hookspec
def colossal_strategies() -> Sequence[StrategySpec]:
    """The strategies of this plugin, each with its config section. Called once, when a config is read."""
    raise NotImplementedError


@hookspec
def colossal_ops() -> Sequence[OpImplementation]:
    """Implementations of core's ops, each for some devices and dtypes. Called once, when the op table of a plan is made."""
    raise NotImplementedError


@hookspec
def colossal_optimizers() -> Sequence[OptimizerSpec]:
    """Optimizers by the name that `optimizer.name` uses. Called once, when a config is read."""
    raise NotImplementedError


@hookspec
def colossal_benchmarks() -> Sequence[Benchmark]:
    """What `colossal bench NAME` measures. Called by that command alone (colossal-kernels: `kernels`)."""
    raise NotImplementedError


@hookspec(firstresult=True)
def colossal_connect(
    mesh: MeshLayout, rank: int, device: torch.device, store_address: str, timeout: timedelta
) -> Collectives | None:
    """Joins the group of `mesh.world_size` ranks and returns its collectives.

    store_address: `file:///path` or `tcp://host:port`, the same on all ranks. Called once per group of ranks, by the kit's worker pool and
    by `launch`. The first plugin that does not return None provides it (colossal-comm).
    """
    raise NotImplementedError
