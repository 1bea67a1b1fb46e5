"""Where memory is: bytes of live tensors by kind, and what is told when it runs out."""

from __future__ import annotations

import os
import resource
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from colossal_core._torch_private import storage_key
from colossal_core.errors import OutOfMemoryError
from colossal_core.peak_estimate import Change, Peak, PeakEstimator

if TYPE_CHECKING:
    from colossal_core.plan import Plan
    from colossal_core.step import StepEngine
    from colossal_core.strategy import Strategy
    from colossal_core.trained import Trained

USABLE = 0.95
"""Share of a device's memory that a plan may ask for: the rest is lost between blocks of the allocator."""

CPU_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""How torch's CPU allocator says it, in a plain RuntimeError."""


def live_bytes(trained: Trained) -> dict[str, int]:
    """Bytes of this rank's state that are allocated now, by kind: parameters, masters, gradients, optimizer, registered.

    Every storage counts once, whole (padding included), for the first kind that has a part in it: masters inside the compute copy are
    parameters. registered: what strategies keep beside. No communication; gathers on their way are not waited for.
    """
    return engine_bytes(trained._engine)


def engine_bytes(engine: StepEngine) -> dict[str, int]:
    """`live_bytes` of an engine."""
    shards = engine.state.shards.values()
    states = list(engine.optimizer.state_tensors())
    elsewhere = sum(state.stored_bytes for state in states if state.stored_bytes is not None)
    seen: set[int] = set()
    return {
        "parameters": _new_bytes((shard.parameter for shard in shards), seen),
        "masters": _new_bytes((shard.master for shard in shards), seen),
        "gradients": _new_bytes((shard.gradient for shard in shards if shard.gradient is not None), seen),
        "optimizer": elsewhere + _new_bytes((state.tensor for state in states if state.stored_bytes is None), seen),
        "registered": _new_bytes((tensor.local for tensor in engine.context.tensors), seen),
    }


def _new_bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        key = storage_key(tensor)
        if key not in seen:
            seen.add(key)
            total += tensor.untyped_storage().nbytes()
    return total


@dataclass(frozen=True)
class DeviceMemory:
    """name: of the device. capacity_bytes: all of its memory. peak_bytes: the most that this process had allocated."""

    name: str
    capacity_bytes: int
    peak_bytes: int


def device_memory(device: torch.device) -> DeviceMemory:
    """What the device has, and what this process has used of it at most. On the CPU: the host's memory, and the process's resident set."""
    if device.type == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return DeviceMemory("cpu", pages, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    _, capacity = torch.accelerator.get_memory_info(device)
    return DeviceMemory(str(device), capacity, torch.accelerator.max_memory_allocated(device))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation has failed, here or in what an error was raised from."""
    while error is not None:
        told = type(error) is RuntimeError and any(text in str(error) for text in CPU_MESSAGES)
        if told or isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        error = error.__cause__
    return False


@contextmanager
def memory_told(report: Callable[[], str]) -> Iterator[None]:
    """Turns a failed allocation inside into `OutOfMemoryError` with the report as its message, the original as its cause.

    report: called after the frames of the failed call have let go of their tensors.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        request = str(error).splitlines()[0] if str(error) else type(error).__name__
        traceback.clear_frames(error.__traceback__)
        raise OutOfMemoryError(f"out of memory {report()}\n  {request}") from error


def step_report(
    engine: StepEngine, strategies: Sequence[Strategy], batch: Mapping[str, torch.Tensor], *, training: bool
) -> str:
    """What took the memory in a step, and the smallest change of plan that would fit."""
    memory = device_memory(engine.context.device)
    live = engine_bytes(engine)
    masters = sum(shard.master.numel() for shard in engine.state.shards.values() if shard.layout.trainable)
    estimator = PeakEstimator(
        engine.model,
        engine.plan,
        strategies,
        engine.loss_owner,
        batch,
        state_bytes=live["optimizer"] / max(masters, 1),
        device_type=engine.context.device.type,
        computes=engine.context.computes,
    )
    planned = estimator.estimate()
    buffers = planned.transients + max(planned.gathered + planned.parameters - live["parameters"], 0)
    state = sum(live.values())
    kinds = {
        "parameters": live["parameters"],
        "masters": live["masters"],
        "gradients": live["gradients"],
        "optimizer states": live["optimizer"],
        "kept by strategies": live["registered"],
        "buffers and gathered parameters": buffers,
        "activations and the work of the step": max(memory.peak_bytes - state - buffers, 0),
    }
    where = f"in step {engine.step} on rank {engine.context.collectives.rank}"
    return told(where, memory, kinds, estimator, training=training)


def state_report(estimator: PeakEstimator, rank: int, device: torch.device) -> str:
    """What would take the memory, where it runs out before the state is there."""
    planned = estimator.estimate()
    kinds = {name: size for name, size in planned.by_kind().items() if size}
    return told(f"while the state was made on rank {rank}", device_memory(device), kinds, estimator, training=True)


def told(
    where: str, memory: DeviceMemory, kinds: Mapping[str, int], estimator: PeakEstimator, *, training: bool
) -> str:
    """The report. Estimates are raised by as much as the plan's own is below what was used."""
    planned = estimator.estimate()
    factor = max(memory.peak_bytes / planned.total, 1.0) if memory.name != "cpu" else 1.0
    lines = [
        f"{where}: {memory.name} has {in_units(memory.capacity_bytes)}, of which at most {in_units(memory.peak_bytes)} was in use:"
    ]
    lines += [f"  {name:<38}{in_units(size):>12}" for name, size in kinds.items() if size]
    if planned.problem:
        lines.append(f"activations are not in the estimates below: {planned.problem}")
    candidates = changes(estimator.plan, training=training)
    lines += _advice(candidates, lambda change: int(estimator.estimate(change).total * factor), memory.capacity_bytes)
    lines.append(f"the plan as it is needs {in_units(int(planned.total * factor))} by the estimate")
    return "\n".join(lines)


def _advice(candidates: Sequence[Change], needed: Callable[[Change], int], capacity_bytes: int) -> Iterator[str]:
    """The first change that fits, in the order given; else what is least."""
    least: tuple[int, Change] | None = None
    for change in candidates:
        size = needed(change)
        if size <= USABLE * capacity_bytes:
            yield f"the smallest change that fits by the estimate: {change} ({in_units(size)})"
            return
        if least is None or size < least[0]:
            least = size, change
    best = "" if least is None else f"; the least is {in_units(least[0])} with {least[1]}"
    yield f"no change of the plan fits by the estimate{best}: use more ranks, or a device with more memory"


def changes(plan: Plan, *, training: bool) -> list[Change]:
    """What to try, from the smallest change to the largest: what only costs traffic, then what costs computation, then both."""
    from colossal_core.peak_estimate import treatment_of

    zero = getattr(plan.config.section("parallel"), "zero", None)
    stage = getattr(zero, "stage", 3)
    found: list[Change] = []
    if zero is not None and stage == 3 and plan.mesh.size("pp") == 1 and plan.gathering.keep in ("microbatch", "step"):
        found.append(Change({"parallel.zero.keep_parameters": "use"}, {"keep_parameters": 0.0}))
    if plan.mesh.size(("dp_shard", "cp")) > 1:
        found += _more_sharded(plan, zero, stage)
    most_sharded = found[-1] if found else Change()
    recomputed = []
    if training and plan.block_names and treatment_of(plan).kept == "none":
        recomputed.append(Change({"recompute.mode": "selective"}, kept="selective"))
    if training and plan.block_names and treatment_of(plan).kept != "full":
        recomputed.append(Change({"recompute.mode": "full"}, kept="full"))
    smaller = []
    size = plan.batch.micro_size
    while size % 2 == 0:
        size //= 2
        smaller.append(Change({"batch.micro_size": size}, micro_size=size))
    whole = most_sharded.and_also(recomputed[-1]) if recomputed else most_sharded
    together = [whole] if found and recomputed else []
    together += [whole.and_also(change) for change in smaller if found or recomputed]
    return [*found, *recomputed, *smaller, *together]


def _more_sharded(plan: Plan, zero: object, stage: int) -> Iterator[Change]:
    """Higher stages of ZeRO. Where gradients are added up whole (in a pipeline, unless told otherwise), shards of them are a step more."""
    default = "step" if plan.mesh.size("pp") > 1 else "microbatch"
    whole = (getattr(zero, "keep_gradients", None) or default) == "step"
    shards = Change({"parallel.zero.keep_gradients": "microbatch"}, {"keep_gradients": 1.0})
    if stage >= 2 and whole:
        yield shards
    for higher in range(stage + 1, 4):
        change = Change({"parallel.zero.stage": higher}, {"zero_stage": float(higher)})
        yield change
        if higher >= 2 and whole:
            yield change.and_also(shards)


def in_units(num_bytes: int) -> str:
    """Bytes for the reader, in the largest unit up to GiB of which there is one."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.{2 if unit == 'GiB' else 1}f} {unit}"
    return f"{num_bytes} B"


def peak_lines(peak: Peak) -> list[str]:
    """A `Peak` as a table: one line a kind, the total last."""
    lines = [f"  {name:<20}{in_units(size):>12}" for name, size in peak.by_kind().items()]
    lines.append(f"  {'peak of a step':<20}{in_units(peak.total):>12}  at the {peak.moment}")
    if peak.problem:
        lines.append(f"  without activations: {peak.problem}")
    return lines
