"""Time and memory of one contestant: some steps to warm up, then timed ones, each between two events on the device."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from beside_peers.contestants import Contestant
from beside_peers.models import PEAK_FLOPS, Shape
from beside_peers.tokens import Tokens
from beside_peers.world import World

GIB = 2**30
NUM_FIRST_LOSSES = 3


@dataclass(frozen=True)
class Timing:
    """Numbers of steps."""

    warmup_steps: int = 4
    timed_steps: int = 10


class Clock:
    """Marks on the device's own time line; on a CPU, the wall's."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between neighbouring marks. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
            pairs = zip(self._marks, self._marks[1:], strict=False)
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]


def measure(
    contestant: Contestant, tokens: Tokens, shape: Shape, world: World, timing: Timing, micro_batch: int
) -> dict[str, Any]:
    """One row's numbers, the same on every rank: of each step the slowest rank's time, of memory the highest rank's."""
    started = time.perf_counter()
    allocated_built = allocated_gib(world.device)
    losses = [contestant.step(tokens.draw()) for _ in range(timing.warmup_steps)]
    synchronize(world.device)
    warmup_seconds = time.perf_counter() - started
    warmup_peak = _peaks(world.device)[0]
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    between = allocated_gib(world.device)
    clock = Clock(world.device)
    started = time.perf_counter()
    clock.mark()
    for _ in range(timing.timed_steps):
        losses.append(contestant.step(tokens.draw()))
        clock.mark()
    seconds = over_ranks(clock.seconds(), world, dist.ReduceOp.MAX)
    wall = (time.perf_counter() - started) / timing.timed_steps
    peak, reserved = _peaks(world.device)
    memory = over_ranks([peak, reserved, warmup_peak, between, allocated_built], world, dist.ReduceOp.MAX)
    beside = over_ranks([beside_allocator_gib(world.device)], world, dist.ReduceOp.MAX)[0]
    told = [*losses[:NUM_FIRST_LOSSES], losses[-1]]
    means = [total / world.size for total in over_ranks([float(loss) for loss in told], world, dist.ReduceOp.SUM)]
    return {
        "step_seconds": statistics.median(seconds),
        "step_seconds_min": min(seconds),
        "step_seconds_max": max(seconds),
        "step_seconds_wall": wall,
        "warmup_seconds": warmup_seconds,
        **_rates(statistics.median(seconds), shape, world.device, micro_batch),
        "peak_allocated_gib": memory[0],
        "peak_reserved_gib": memory[1],
        "warmup_peak_gib": memory[2],
        "between_steps_gib": memory[3],
        "built_gib": memory[4],
        "beside_allocator_gib": beside,
        "losses_first": means[:-1],
        "loss_first": means[0],
        "loss_last": means[-1],
    }


def _rates(seconds: float, shape: Shape, device: torch.device, micro_batch: int) -> dict[str, float | None]:
    rate = micro_batch * shape.sequence_length / seconds
    peak = peak_flops(device)
    return {"tokens_per_second_per_gpu": rate, "mfu": rate * shape.flops_per_token / peak if peak else None}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 of the device, or None for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_FLOPS.items() if part in name), None)


def over_ranks(values: list[float], world: World, op: Any) -> list[float]:
    """Element by element over all ranks. Waits."""
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(tensor, op=op)
    found: list[float] = tensor.tolist()
    return found


def allocated_gib(device: torch.device) -> float:
    return torch.cuda.memory_allocated() / GIB if device.type == "cuda" else 0.0


def beside_allocator_gib(device: torch.device) -> float:
    """What this process holds of the device outside torch's allocator: CUDA's context, NCCL's buffers, symmetric memory. What earlier rows
    of the same processes made stays in it.
    """
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free - torch.cuda.memory_reserved(device)) / GIB


def _peaks(device: torch.device) -> tuple[float, float]:
    if device.type != "cuda":
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
