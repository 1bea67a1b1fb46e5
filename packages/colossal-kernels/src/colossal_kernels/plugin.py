"""What colossal-kernels contributes, found through the entry point `kernels` of the group `colossal.plugins`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from colossal_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from colossal_core.benchmarks import Benchmark
    from colossal_core.ops import OpImplementation

COLOSSAL_PLUGIN_API = (0, 1)


@hookimpl
def colossal_ops() -> Sequence[OpImplementation]:
    from colossal_kernels.table import implementations

    return implementations()


@hookimpl
def colossal_benchmarks() -> Sequence[Benchmark]:
    from colossal_core.benchmarks import Benchmark
    from colossal_kernels.bench import run

    return (Benchmark("kernels", run),)
