"""`python -m colossal_kernels.bench.sweep OP` tries the settings of an op's kernels and prints the fastest of them.

What is tried is said in the op's file in `cases/` (`knobs`): constants and functions of the kernel's module, which are looked up when a
kernel is launched, and fields of the dataclass that such a function returns. Nothing is written: the best ones are for the module's author
to take over. All settings are compiled first, by several processes at once, into Triton's cache on the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from colossal_core.errors import ConfigError, Problem
from colossal_kernels.bench.case import Call, Direction, Draw, Function, Knobs, OpBench, Shape
from colossal_kernels.bench.clock import Clock, CudaClock
from colossal_kernels.bench.command import available, known_benches
from colossal_kernels.bench.measure import reference_of, resolved, restoring, timed_call
from colossal_kernels.bench.outcome import copied, distance, outcome, widened

Setting = Mapping[str, Any]
PACKAGE = "colossal_kernels"


@dataclass(frozen=True)
class Trial:
    """One setting of one shape and direction. error: as in the benchmark, over that of the module as it is. failed: it does not run."""

    setting: Setting
    milliseconds: float = math.inf
    error_ratio: float = math.nan
    failed: str = ""

    @property
    def good(self) -> bool:
        return not self.failed and not self.error_ratio > 1.5


def settings_of(knobs: Knobs) -> list[Setting]:
    """The module as it is, then every combination."""
    names = list(knobs.values)
    return [{}, *(dict(zip(names, found, strict=True)) for found in itertools.product(*knobs.values.values()))]


@contextlib.contextmanager
def overridden(setting: Setting) -> Iterator[None]:
    """The modules' constants and functions are others inside, in every module of this package that has imported a function by name."""
    before: list[tuple[Any, str, Any]] = []
    try:
        for place, value in setting.items():
            module_name, _, path = place.partition(":")
            name, _, field = path.partition(".")
            now = getattr(importlib.import_module(f"{PACKAGE}.{module_name}"), name)
            new = _other(now, field, value) if callable(now) else value
            for module in _modules_with(f"{PACKAGE}.{module_name}", name, now):
                before.append((module, name, now))
                setattr(module, name, new)
        yield
    finally:
        for module, name, value in reversed(before):
            setattr(module, name, value)


def _other(function: Callable[..., Any], field: str, value: Any) -> Callable[..., Any]:
    """field: of what the function returns, a dataclass, which is replaced in it; without one the whole is."""
    if callable(value):
        found: Callable[..., Any] = value
        return found
    if not field:
        return lambda *_arguments, **_keywords: value
    return lambda *arguments, **keywords: replace(function(*arguments, **keywords), **{field: value})


def _modules_with(home: str, name: str, value: Any) -> list[Any]:
    if not callable(value):
        return [sys.modules[home]]
    ours = [module for title, module in list(sys.modules.items()) if title.startswith(f"{PACKAGE}.")]
    return [module for module in ours if vars(module).get(name) is value]


def told(setting: Setting) -> str:
    return ", ".join(f"{place.partition(':')[2]}={value}" for place, value in setting.items()) or "as it is"


@dataclass(frozen=True)
class Sweep:
    """One op's trials on a device."""

    bench: OpBench
    function: Function
    clock: Clock
    device: torch.device
    deadline: float

    def trials(self, shape: Shape, direction: Direction, knobs: Knobs) -> list[Trial]:
        call = shape.call(Draw(self.device))
        truth = self._truth(call, direction)
        found: list[Trial] = []
        base = math.nan
        for setting in settings_of(knobs):
            if time.monotonic() > self.deadline:
                break
            trial = self._trial(setting, shape, call, direction, truth, base)
            base = trial.error_ratio if not found else base
            found.append(trial if found else Trial(setting, trial.milliseconds, 1.0, trial.failed))
        return found

    def _truth(self, call: Call, direction: Direction) -> list[torch.Tensor] | None:
        if self.bench.compared == "nothing":
            return None
        return outcome(reference_of(self.bench), widened(call, getattr(torch, self.bench.compared)), (direction,))

    def _trial(
        self,
        setting: Setting,
        shape: Shape,
        call: Call,
        direction: Direction,
        truth: list[torch.Tensor] | None,
        base: float,
    ) -> Trial:
        """base: the error of the module as it is; without one the error itself is told."""
        try:
            with overridden(setting):
                error = (
                    math.nan if truth is None else distance(outcome(self.function, copied(call), (direction,)), truth)
                )
                own = copied(call)
                prepare = restoring(own, call) if shape.restored else None
                taken = self.clock.sample(timed_call(direction, self.function, own), prepare).median_ms
        except Exception as failure:  # settings that do not compile or do not fit are part of the search
            return Trial(setting, failed=" ".join(f"{type(failure).__name__}: {failure}".split())[:160])
        return Trial(setting, taken, error if math.isnan(base) else error / max(base, 1e-30))

    def warm(self, part: int, parts: int) -> None:
        """Runs this part of all settings once, so that they lie in Triton's cache."""
        for shape, direction, knobs in searched(self.bench):
            for setting in settings_of(knobs)[part::parts]:
                # Several processes may not find memory at once: what is left out is compiled when it is tried.
                with contextlib.suppress(Exception), overridden(setting):
                    outcome(self.function, shape.call(Draw(self.device)), (direction,))


def searched(bench: OpBench) -> Iterator[tuple[Shape, Direction, Knobs]]:
    for shape in bench.shapes:
        for direction in shape.least:
            for knobs in bench.knobs:
                if direction in knobs.directions:
                    yield shape, direction, knobs


def table(title: str, trials: list[Trial], most: int) -> list[str]:
    """The fastest settings, and the module as it is."""
    ranked = sorted((trial for trial in trials if trial.good), key=lambda trial: trial.milliseconds)
    lines = [f"{title}: {len(trials)} tried, {len(trials) - len(ranked)} failed or less exact"]
    now = next((trial for trial in trials if not trial.setting), None)
    base = math.nan if now is None else now.milliseconds
    shown = [*ranked[:most], *([now] if now is not None and now not in ranked[:most] else [])]
    return lines + [
        f"  {trial.milliseconds:8.4f} ms  x {base / trial.milliseconds:.3f}  {told(trial.setting)} {trial.failed}".rstrip()
        for trial in shown
    ]


def sweep_of(op: str, deadline: float, num_shapes: int = 0) -> Sweep:
    """num_shapes: the first ones; 0: all. Raises ConfigError for an op that has no settings to try, and where there is no GPU."""
    known = {name: bench for name, bench in known_benches().items() if bench.knobs}
    problems = []
    if op not in known:
        problems.append(
            Problem("OP", f"no settings to try; there are {', '.join(known) or 'none'}", "choose among these", op)
        )
    if not torch.cuda.is_available():
        problems.append(
            Problem("sweep", "settings are tried on a GPU, and torch finds none", "run it where there is one")
        )
    if problems:
        raise ConfigError(problems)
    entry = next(found for found in available("cuda") if found.op == op)
    bench = replace(known[op], shapes=known[op].shapes[: num_shapes or None])
    device = torch.device("cuda", torch.cuda.current_device())
    return Sweep(bench, resolved(entry), CudaClock(device), device, deadline)


def compile_ahead(op: str, processes: int, num_shapes: int) -> None:
    command = [sys.executable, "-m", "colossal_kernels.bench.sweep", op, "--shapes", str(num_shapes)]
    workers = [subprocess.Popen([*command, "--part", f"{index}/{processes}"]) for index in range(processes)]
    for worker in workers:
        worker.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op")
    parser.add_argument("--minutes", type=float, default=5.0, help="after which nothing more is tried")
    parser.add_argument("--processes", type=int, default=8, help="that compile ahead; 0: none")
    parser.add_argument("--shapes", type=int, default=0, help="of the benchmark, the first ones; 0: all")
    parser.add_argument("--most", type=int, default=6, help="settings that are printed for each shape")
    parser.add_argument("--json", type=Path, help="all trials")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        sweep = sweep_of(given.op, time.monotonic() + 60 * given.minutes, given.shapes)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    if given.part is not None:
        part, parts = (int(number) for number in given.part.split("/"))
        sweep.warm(part, parts)
        return 0
    if given.processes > 1:
        compile_ahead(given.op, given.processes, given.shapes)
    everything = []
    for shape, direction, knobs in searched(sweep.bench):
        trials = sweep.trials(shape, direction, knobs)
        sys.stdout.write("\n".join(table(f"{given.op} {direction} {shape.label}", trials, given.most)) + "\n")
        sys.stdout.flush()
        everything.append({"shape": shape.label, "direction": direction, "trials": [vars(trial) for trial in trials]})
    if given.json is not None:
        given.json.write_text(json.dumps(everything, indent=1, default=str), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
