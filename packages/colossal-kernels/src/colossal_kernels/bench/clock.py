"""Milliseconds of a call on the device's own time line.

The device's caches are emptied before each repetition by overwriting 1 GiB. That takes the device 0.3 ms, during which the host queues
the call, so that the time of a launch is not counted; of a call that takes the host longer, so many GiB are overwritten that it is not.
The host is held up now and then (autograd's own thread has to be woken): where the device has reached the call before all of it was
queued, the repetition is made again with twice as many GiB.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from colossal_kernels.bench.case import GIB

FLUSHED_BYTES = 1 << 30
FLUSH_MS = 0.3
"""On an H200, which is the fastest to do it: 3.39 TB/s."""
MOST_FLUSHES = 40


@dataclass(frozen=True)
class Sample:
    """Of all repetitions. host_ms: the host was busy with one call for so long."""

    median_ms: float
    lowest_ms: float
    highest_ms: float
    host_ms: float


class Clock(Protocol):
    """Times `call`; `prepare` runs before each repetition and is not counted."""

    def sample(self, call: Callable[[], object], prepare: Callable[[], object] | None = None) -> Sample: ...

    def extra_bytes(self, call: Callable[[], object]) -> int:
        """How much more memory a call takes at its peak than was taken before it, its results included."""
        ...


class CudaClock:
    """By CUDA events."""

    def __init__(self, device: torch.device, repeats: int = 20, warmups: int = 3) -> None:
        self._device, self._repeats, self._warmups = device, repeats, warmups
        self._flushed = torch.empty(FLUSHED_BYTES // 4, dtype=torch.float32, device=device)

    def sample(self, call: Callable[[], object], prepare: Callable[[], object] | None = None) -> Sample:
        host_ms = math.inf
        for _ in range(self._warmups):
            if prepare is not None:
                prepare()
            torch.cuda.synchronize(self._device)
            began = time.perf_counter()
            call()
            host_ms = min(host_ms, 1e3 * (time.perf_counter() - began))
        flushes = min(max(math.ceil(1.5 * host_ms / FLUSH_MS), 1), MOST_FLUSHES)
        found: list[float] = []
        while len(found) < self._repeats:
            taken, waited = self._once(call, prepare, flushes)
            if waited and flushes < MOST_FLUSHES:
                flushes = min(2 * flushes, MOST_FLUSHES)
            else:
                found.append(taken)
        return Sample(statistics.median(found), min(found), max(found), host_ms)

    def _once(
        self, call: Callable[[], object], prepare: Callable[[], object] | None, flushes: int
    ) -> tuple[float, bool]:
        """Milliseconds, and whether the device may have waited for the host in them."""
        if prepare is not None:
            prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(flushes):
            self._flushed.fill_(1.0)
        begin.record()
        call()
        end.record()
        waited = begin.query()
        end.synchronize()
        return float(begin.elapsed_time(end)), waited

    def extra_bytes(self, call: Callable[[], object]) -> int:
        call()
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        kept = call()
        torch.cuda.synchronize(self._device)
        del kept
        return torch.cuda.max_memory_allocated(self._device) - before


class CpuClock:
    """By the process's wall clock, which other work on the machine disturbs: `lowest_ms` is the one to look at."""

    def __init__(self, repeats: int = 7, warmups: int = 1) -> None:
        self._repeats, self._warmups = repeats, warmups

    def sample(self, call: Callable[[], object], prepare: Callable[[], object] | None = None) -> Sample:
        found = []
        for index in range(self._warmups + self._repeats):
            if prepare is not None:
                prepare()
            began = time.perf_counter()
            call()
            if index >= self._warmups:
                found.append(1e3 * (time.perf_counter() - began))
        return Sample(statistics.median(found), min(found), max(found), statistics.median(found))

    def extra_bytes(self, call: Callable[[], object]) -> int:
        """Not measured: 0."""
        del call
        return 0


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at best, measured in the same run and in the same way.

    copy: bytes read and written a second, of a large tensor. matmul: FLOP/s of a product of 8192^3 in bfloat16, 0 on a CPU. copy_of(bytes):
    bytes a second of a copy that moves so many in all. device_name: goals are those of one device.
    """

    copy: float
    matmul: float
    copy_of: Callable[[int], float]
    device_name: str


def measured_ceilings(clock: Clock, device: torch.device) -> Ceilings:
    known: dict[int, float] = {}

    def copy_of(num_bytes: int) -> float:
        each = max(num_bytes // 2, 16)
        if each not in known:
            source = torch.randint(256, (each,), dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            known[each] = 2e3 * each / clock.sample(lambda: target.copy_(source)).median_ms
        return known[each]

    if device.type == "cpu":
        return Ceilings(copy_of(GIB // 4), 0.0, copy_of, "CPU")
    left, right = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    matmul = 2e3 * 8192**3 / clock.sample(lambda: left @ right).median_ms
    return Ceilings(copy_of(4 * GIB), matmul, copy_of, torch.cuda.get_device_name(device))
