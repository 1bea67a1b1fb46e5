"""The rows of a table: one shape and direction of an op, by one of those that are compared."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from colossal_core.ops.reference import reference_ops, torch_ops
from colossal_core.ops.table import OpImplementation
from colossal_kernels._torch_private import backward_that_can_run_again
from colossal_kernels.bench.case import Call, Direction, Draw, Function, Least, OpBench, Shape
from colossal_kernels.bench.clock import Ceilings, Clock
from colossal_kernels.bench.outcome import (
    copied,
    distance,
    ends_of,
    gradient_weights,
    inputs_of,
    outcome,
    tensors_of,
    widened,
)
from colossal_kernels.table import Deferred


@dataclass(frozen=True)
class Row:
    """One measurement. contestant: `eager`, `compile`, a peer, or the provider of an implementation, for which `ours` holds.

    extra_bytes: at the peak, over what was allocated before, results included. error: relative distance to the reference in a wider dtype,
    of the worst output or gradient. copy_bytes_per_s: of a copy that moves as many bytes as the least. failed: why there are no numbers.
    """

    op: str
    shape: str
    direction: Direction
    contestant: str
    ours: bool
    least: Least
    median_ms: float = math.nan
    lowest_ms: float = math.nan
    highest_ms: float = math.nan
    host_ms: float = math.nan
    extra_bytes: int = 0
    error: float = math.nan
    copy_bytes_per_s: float = math.nan
    failed: str = ""

    @property
    def bytes_per_s(self) -> float:
        return 1e3 * self.least.num_bytes / self.median_ms

    @property
    def flops_per_s(self) -> float:
        return 1e3 * self.least.flops / self.median_ms


@dataclass(frozen=True)
class Contestant:
    """name: of a column. make: imports or builds what is called."""

    name: str
    ours: bool
    make: Callable[[], Function]


class DeviceLostError(Exception):
    """The device answers no more: nothing else can be measured in this process."""


def contestants(
    bench: OpBench, implementations: Sequence[OpImplementation], device_type: str, wanted: Sequence[str]
) -> list[Contestant]:
    """Those that there are here, ours first. wanted: by name, all where empty; ours are always there."""
    found = [Contestant(entry.provider, True, lambda entry=entry: resolved(entry)) for entry in implementations]  # type: ignore[misc]
    if bench.ours is not None:
        found.append(Contestant("ours", True, bench.ours))
    others = [Contestant(name, False, make) for name, make in bench.peers.items()]
    formula = bench.formula or bench.eager
    if formula is not None and device_type == "cuda":
        others.insert(0, Contestant("compile", False, lambda: torch.compile(formula, dynamic=False)))
    eager = bench.eager
    if eager is not None:
        others.insert(0, Contestant("eager", False, lambda: eager))
    torch_s = [entry for entry in torch_ops() if entry.op == bench.op and device_type in entry.device_types]
    torch_s = [entry for entry in torch_s if entry.provider not in bench.peers]
    others += [Contestant(entry.provider, False, lambda entry=entry: entry.function) for entry in torch_s]  # type: ignore[misc]
    return [*found, *(other for other in others if not wanted or other.name in wanted)]


def resolved(implementation: OpImplementation) -> Function:
    """The function behind an implementation, imported now: its import is not timed, and dynamo sees no indirection."""
    function = implementation.function
    found: Function = function.resolved() if isinstance(function, Deferred) else function
    return found


def reference_of(bench: OpBench) -> Function:
    """What gives the truth."""
    if bench.reference is not None:
        return bench.reference
    return next(found.function for found in reference_ops() if found.op == bench.op)


@dataclass
class Workbench:
    """What rows of one run have in common."""

    clock: Clock
    ceilings: Ceilings
    device: torch.device
    implementations: Sequence[OpImplementation]
    wanted: Sequence[str] = ()

    def rows(self, bench: OpBench, shape: Shape) -> Iterator[Row]:
        """Every contestant in every direction, ours first. Raises DeviceLostError when the device is lost."""
        ours = [entry for entry in self.implementations if entry.op == bench.op]
        call = shape.call(Draw(self.device))
        truth = None
        try:
            truth = self._truth(bench, shape, call)
        except Exception as failure:  # times are worth having without errors beside them
            direction, least = next(iter(shape.least.items()))
            yield _failed(Row(bench.op, shape.label, direction, "reference", False, least), failure)
            self._survive()
        for contestant in contestants(bench, ours, self.device.type, self.wanted):
            yield from self._of(contestant, bench, shape, call, truth)
            self._clear()

    def _truth(self, bench: OpBench, shape: Shape, call: Call) -> list[torch.Tensor] | None:
        if bench.compared == "nothing":
            return None
        return outcome(reference_of(bench), widened(call, getattr(torch, bench.compared)), shape.least)

    def _of(
        self, contestant: Contestant, bench: OpBench, shape: Shape, call: Call, truth: list[torch.Tensor] | None
    ) -> Iterator[Row]:
        error = math.nan
        rows = [
            Row(bench.op, shape.label, direction, contestant.name, contestant.ours, least)
            for direction, least in shape.least.items()
        ]
        again = backward_that_can_run_again() if "backward" in shape.least else contextlib.nullcontext()
        try:
            function = contestant.make()
        except ImportError as missing:
            yield from (_failed(row, missing) for row in rows if contestant.ours)
            return
        for row in rows:
            try:
                with again:
                    if truth is not None and math.isnan(error):
                        error = distance(outcome(function, copied(call), shape.least), truth)
                    found = self._measured(row, function, shape, call, error)
            except Exception as failure:  # a peer may fail in any way, and the others are still measured
                found = _failed(row, failure)
            yield found
            if found.failed:
                self._survive()

    def _measured(self, row: Row, function: Function, shape: Shape, call: Call, error: float) -> Row:
        own = copied(call)
        timed = timed_call(row.direction, function, own)
        prepare = restoring(own, call) if shape.restored else None
        extra = self.clock.extra_bytes(timed)
        sample = self.clock.sample(timed, prepare)
        near = self.ceilings.copy_of(row.least.num_bytes)
        return replace(row, **vars(sample), extra_bytes=extra, error=error, copy_bytes_per_s=near)

    def _survive(self) -> None:
        """Raises DeviceLostError where the device is lost: an illegal access ends all work of a process on it."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except Exception as lost:
            raise DeviceLostError(str(lost)) from lost

    def _clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()


def _failed(row: Row, failure: Exception) -> Row:
    return replace(row, failed=" ".join(f"{type(failure).__name__}: {failure}".split())[:300])


def timed_call(direction: Direction, function: Function, call: Call) -> Callable[[], object]:
    """What is timed, without arguments."""
    if direction == "forward":
        return lambda: function(*call.arguments, **call.keywords)
    if direction == "step":

        def step() -> object:
            with torch.no_grad():
                return function(*call.arguments, **call.keywords)

        return step
    inputs = inputs_of(call)
    if direction == "both":
        one = gradient_weights(ends_of(function(*call.arguments, **call.keywords)))

        def both() -> object:
            return torch.autograd.grad(ends_of(function(*call.arguments, **call.keywords)), inputs, one)

        return both
    ends = ends_of(function(*call.arguments, **call.keywords))
    weights = gradient_weights(ends)
    return lambda: torch.autograd.grad(ends, inputs, weights, retain_graph=True)


def restoring(own: Call, first: Call) -> Callable[[], object]:
    """Gives a call's tensors the values back that they had first."""
    everything = (tensors_of([*call.arguments, *call.keywords.values()]) for call in (own, first))
    pairs = [pair for pair in zip(*everything, strict=True) if pair[0].is_floating_point()]

    def restore() -> None:
        with torch.no_grad():
            for mine, theirs in pairs:
                mine.copy_(theirs)

    return restore
