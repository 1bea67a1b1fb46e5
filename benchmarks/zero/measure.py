"""Time and memory of one contestant: some steps to warm up, then timed ones, each between two events on the device."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from zero.contestants import Contestant, World
from zero.models import PEAK_FLOPS, Shape

GIB = 2**30


@dataclass(frozen=True)
class Timing:
    """Numbers of steps."""

    warmup_steps: int = 4
    timed_steps: int = 10


class Tokens:
    """Fresh random ids [B, T] on the device for every step, from one stream a rank: the same for every contestant."""

    def __init__(self, shape: Shape, micro_batch: int, world: World) -> None:
        self._size = (micro_batch, shape.sequence_length)
        self._vocab = shape.counted_vocab
        self._generator = torch.Generator(world.device)
        self._generator.manual_seed(1000 + world.rank)

    def draw(self) -> torch.Tensor:
        device = self._generator.device
        return torch.randint(0, self._vocab, self._size, generator=self._generator, device=device)


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
    means = over_ranks([float(loss) for loss in (losses[0], losses[-1])], world, dist.ReduceOp.SUM)
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
        "loss_first": means[0] / world.size,
        "loss_last": means[1] / world.size,
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


def _peaks(device: torch.device) -> tuple[float, float]:
    if device.type != "cuda":
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
