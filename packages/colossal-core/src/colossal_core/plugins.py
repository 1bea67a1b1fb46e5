"""Finding, checking and ordering plugins. Nothing is skipped in silence: a plugin that cannot be used is an error that names it.

The manager is an object, made by whoever reads a config; importing core loads no plugin. `COLOSSAL_PLUGINS=zero,tensor` is an allow-list.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from colossal_core import hookspecs
from colossal_core.errors import PluginError, Problem, raise_problems

if TYPE_CHECKING:
    import pluggy

    from colossal_core.benchmarks import Benchmark
    from colossal_core.config import TrainConfig
    from colossal_core.ops import OpImplementation
    from colossal_core.optimizers import OptimizerSpec
    from colossal_core.strategy import Strategy, StrategySpec

ALLOW_LIST_VARIABLE = "COLOSSAL_PLUGINS"
BUILTIN = "builtin"


@dataclass(frozen=True)
class PluginInfo:
    """One installed plugin, as `colossal plugins` prints it. api: the contract version that it declares."""

    name: str
    distribution: str
    version: str
    api: tuple[int, int]
    hooks: tuple[str, ...]


@dataclass(frozen=True)
class Plugins:
    """All usable plugins, ordered by name; core's built-in ones first."""

    manager: pluggy.PluginManager
    infos: tuple[PluginInfo, ...]

    def strategies(self) -> tuple[StrategySpec, ...]:
        """Every strategy, by name. Two of one name are an error."""
        specs = sorted(
            (spec for found in self.manager.hook.colossal_strategies() for spec in found), key=lambda spec: spec.name
        )
        names = [spec.name for spec in specs]
        doubled = sorted({name for name in names if names.count(name) > 1})
        reason = "two installed plugins contribute a strategy of this name"
        raise_problems((Problem(f"strategy {name}", reason, "uninstall one of them") for name in doubled), PluginError)
        return tuple(specs)

    def ops(self) -> tuple[OpImplementation, ...]:
        return tuple(op for found in self.manager.hook.colossal_ops() for op in found)

    def benchmarks(self) -> Mapping[str, Benchmark]:
        """By the name that `colossal bench` uses. Two of one name are an error."""
        found = [benchmark for benchmarks in self.manager.hook.colossal_benchmarks() for benchmark in benchmarks]
        names = [benchmark.name for benchmark in found]
        reason, remedy = "two installed plugins contribute it", "uninstall one of them"
        doubled = sorted({name for name in names if names.count(name) > 1})
        raise_problems((Problem(f"benchmark {name}", reason, remedy) for name in doubled), PluginError)
        return {benchmark.name: benchmark for benchmark in found}

    def optimizers(self) -> Mapping[str, OptimizerSpec]:
        found: dict[str, OptimizerSpec] = {}
        for specs in self.manager.hook.colossal_optimizers():
            for spec in specs:
                if spec.name in found:
                    raise PluginError(
                        [
                            Problem(
                                f"optimizer {spec.name}", "two installed plugins contribute it", "uninstall one of them"
                            )
                        ]
                    )
                found[spec.name] = spec
        return found

    def config_class(self) -> type[TrainConfig]:
        """The config with the sections of all strategies."""
        from colossal_core.config import ConfigSpec, build_config_class

        return build_config_class(ConfigSpec(spec.section, spec.config_class) for spec in self.strategies())

    def active(self, config: TrainConfig) -> tuple[Strategy, ...]:
        """The strategies that a config asks for, in the order in which they are applied: by phase, `after`, then name."""
        made = (spec.factory(config.section(spec.section)) for spec in self.strategies())
        return in_order(strategy for strategy in made if strategy is not None)

    def axis_sizes(self, config: TrainConfig) -> dict[str, int]:
        """The sizes of base axes that the config asks for; dp_shard is what is left over."""
        sizes: dict[str, int] = {}
        for spec in self.strategies():
            sizes.update(spec.axis_sizes(config.section(spec.section)))
        return sizes


def in_order(strategies: Iterable[Strategy]) -> tuple[Strategy, ...]:
    """Sorted by phase and name, each one behind those that its `after` names in the same phase."""
    pending = sorted(strategies, key=lambda strategy: (strategy.phase, strategy.name))
    ordered: list[Strategy] = []
    while pending:
        waiting = {(strategy.phase, strategy.name) for strategy in pending}
        ready = [s for s in pending if not any((s.phase, name) in waiting for name in s.after)]
        if not ready:
            names = ", ".join(strategy.name for strategy in pending)
            raise PluginError(
                [Problem("strategies", f"{names} wait for one another by `after`", "uninstall one of them")]
            )
        ordered.append(ready[0])
        pending.remove(ready[0])
    return tuple(ordered)


def discover(entry_points: Sequence[metadata.EntryPoint] | None = None, allow: str | None = None) -> Plugins:
    """Loads every installed plugin, whichever order the file system lists them in.

    entry_points: those of the group `colossal.plugins`; None: the environment's. allow: comma-separated names to load; None: the
    variable COLOSSAL_PLUGINS, and every plugin without it.

    Raises: PluginError with all problems: a plugin that fails to import, was written for another contract version, implements
    a hook that does not exist or with a default value, a name that two distributions claim, an allowed name that is not installed.
    """
    import pluggy

    if entry_points is None:
        entry_points = tuple(metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP))
    allow = os.environ.get(ALLOW_LIST_VARIABLE) if allow is None else allow
    chosen, problems = _choose(entry_points, allow)
    manager = pluggy.PluginManager("colossal")
    manager.add_hookspecs(hookspecs)
    infos = [_register(manager, BUILTIN, import_module("colossal_core.builtin"), "colossal-core")]
    for entry_point in chosen:
        owner = entry_point.dist.name if entry_point.dist is not None else "unknown"
        try:
            plugin = entry_point.load()
        except Exception as error:  # whatever a stranger's import raises becomes an error that names the plugin
            reason = f"failed to import {entry_point.value} ({type(error).__name__}: {error})"
            problems.append(Problem(f"plugin {entry_point.name}", reason, f"repair or uninstall {owner}"))
            continue
        found = list(_contract_problems(entry_point.name, owner, plugin))
        problems += found
        if not found:
            infos.append(_register(manager, entry_point.name, plugin, owner))
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        reason = f"implements a hook that does not exist ({error})"
        problems.append(Problem("plugins", reason, "see `colossal_core.hookspecs` for the hooks"))
    raise_problems(problems, PluginError)
    return Plugins(manager, tuple(infos))


def _choose(
    entry_points: Sequence[metadata.EntryPoint], allow: str | None
) -> tuple[list[metadata.EntryPoint], list[Problem]]:
    """The entry points to load, by name, and what is wrong with their names."""
    problems: list[Problem] = []
    by_name: dict[str, list[metadata.EntryPoint]] = {}
    for entry_point in entry_points:
        if entry_point not in by_name.setdefault(entry_point.name, []):
            by_name[entry_point.name].append(entry_point)
    allowed = sorted(by_name) if allow is None else [name.strip() for name in allow.split(",") if name.strip()]
    for name in sorted(set(allowed) - set(by_name)):
        installed = ", ".join(sorted(by_name)) or "none"
        problems.append(
            Problem(
                ALLOW_LIST_VARIABLE, f"names a plugin that is not installed; installed: {installed}", "correct it", name
            )
        )
    chosen = []
    for name in sorted(set(allowed) & set(by_name)):
        owners = sorted({found.dist.name if found.dist is not None else "unknown" for found in by_name[name]})
        if len(by_name[name]) > 1 and len(owners) > 1:
            problems.append(
                Problem(f"plugin {name}", f"provided by {' and by '.join(owners)}", "uninstall one of them")
            )
        else:
            chosen.append(by_name[name][0])
    return chosen, problems


def _contract_problems(name: str, owner: str, plugin: Any) -> Iterable[Problem]:
    declared = getattr(plugin, "COLOSSAL_PLUGIN_API", None)
    major, minor = hookspecs.PLUGIN_API
    if not (isinstance(declared, tuple) and len(declared) == 2 and all(isinstance(part, int) for part in declared)):
        reason = "declares no COLOSSAL_PLUGIN_API = (major, minor)"
        yield Problem(f"plugin {name}", reason, f"set it to {hookspecs.PLUGIN_API} in {owner}")
    elif declared[0] != major or declared[1] > minor:
        reason = f"was written for plugin API {declared[0]}.{declared[1]}; this colossal-core has {major}.{minor}"
        yield Problem(f"plugin {name}", reason, f"pip install --upgrade {owner} colossal-core")
    for hook in _hooks_of(plugin):
        defaults = [
            p.name for p in inspect.signature(getattr(plugin, hook)).parameters.values() if p.default is not p.empty
        ]
        if defaults:
            reason = f"{hook} gives {', '.join(defaults)} a default value, whose meaning depends on pluggy's version"
            yield Problem(f"plugin {name}", reason, f"remove the default in {owner}")


def _hooks_of(plugin: Any) -> tuple[str, ...]:
    return tuple(name for name in dir(plugin) if getattr(getattr(plugin, name), "colossal_impl", None) is not None)


def _register(manager: pluggy.PluginManager, name: str, plugin: Any, owner: str) -> PluginInfo:
    import pluggy

    try:
        manager.register(plugin, name)
    except pluggy.PluginValidationError as error:
        raise PluginError(
            [Problem(f"plugin {name}", str(error).replace("\n", " "), f"repair or uninstall {owner}")]
        ) from None
    api = getattr(plugin, "COLOSSAL_PLUGIN_API", hookspecs.PLUGIN_API)
    return PluginInfo(name, owner, _version(owner), api, _hooks_of(plugin))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"
