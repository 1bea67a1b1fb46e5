"""What plugins measure of a machine is found by name."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from colossal_core.benchmarks import Benchmark, BenchmarkRequest
from colossal_core.errors import PluginError
from colossal_core.hookspecs import hookimpl
from colossal_core.plugins import discover


class Measuring:
    """A plugin with one benchmark, which says what it is asked."""

    @hookimpl
    def colossal_benchmarks(self) -> Sequence[Benchmark]:
        return [Benchmark("disks", lambda request, say: say(f"{request.names} on {request.device}"))]


def test_a_benchmark_is_found_by_its_name() -> None:
    plugins = discover(entry_points=())
    assert plugins.benchmarks() == {}
    plugins.manager.register(Measuring(), "one")
    said: list[str] = []
    plugins.benchmarks()["disks"].run(BenchmarkRequest(("read",), "cpu"), said.append)
    assert said == ["('read',) on cpu"]


def test_two_of_one_name_are_an_error() -> None:
    plugins = discover(entry_points=())
    plugins.manager.register(Measuring(), "one")
    plugins.manager.register(Measuring(), "two")
    with pytest.raises(PluginError) as caught:
        plugins.benchmarks()
    assert str(caught.value) == "benchmark disks: two installed plugins contribute it: uninstall one of them"
