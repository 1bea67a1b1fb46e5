"""How much communication is hidden behind computation, from one profile of a few steps on one GPU.

Every kernel is an interval on the device's time line. Hidden is the time of communication kernels during which a computing kernel ran on
the same GPU; what is left is exposed. A communication kernel's time includes waiting for the other ranks, so a late rank shows as exposed
time on the others. Copies and casts do not count as computation.

Symmetric memory sends by copies from another GPU's memory, with signals around them. A trace may call such a copy one inside the device; it
is told by its rate, which over NVLink stays under a third of what the slowest large copy in local memory reaches.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Interval = tuple[float, float]
Kind = Literal[
    "all-gather", "reduce-scatter", "all-reduce", "other communication", "peer copy", "peer signal", "copy", "compute"
]
COMMUNICATION: tuple[Kind, ...] = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "other communication",
    "peer copy",
    "peer signal",
)
_NCCL: Mapping[str, Kind] = {
    "AllGather": "all-gather",
    "ReduceScatter": "reduce-scatter",
    "AllReduce": "all-reduce",
}
_SIGNAL_WORDS = ("barrier_kernel", "put_signal", "wait_signal", "stream_write_value", "stream_wait_value")
PEER_COPY_BYTES = 2**20
PEER_COPY_RATE = 600e9
"""Bytes a second. NVLink carries 450e9 in one direction on an H200; a copy of a MiB or more inside it moves at 1.5e12 and more."""
_COPY_WORDS = (
    "memcpy",
    "memset",
    "copy_kernel",
    "copy_device",
    "catarray",
    "split_with_sizes",
    "chunk_cat",
    "fillfunctor",
)
_TRITON_COPY = re.compile(
    r"^triton_[a-z]+_fused((_+to_copy|_clone|_view|_t|_copy_?|_cat|_slice|_expand|_permute|_transpose))+(_\d+)*$"
)


@dataclass(frozen=True)
class Kernel:
    """One interval of work on the device, in microseconds. copied_bytes: of a copy by the device's copy engines."""

    name: str
    start: float
    end: float
    copied_bytes: int = 0

    @property
    def kind(self) -> Kind:
        """What it is for: by its name, and a copy by its rate too."""
        seconds = 1e-6 * (self.end - self.start)
        large = self.copied_bytes >= PEER_COPY_BYTES and "DtoD" in self.name
        return "peer copy" if large and self.copied_bytes < PEER_COPY_RATE * seconds else kind_of(self.name)


def kind_of(name: str) -> Kind:
    """What a kernel is for, by its name."""
    if "nccl" in name.lower():
        return next((kind for part, kind in _NCCL.items() if part in name), "other communication")
    low = name.lower()
    if "memcpy ptop" in low:
        return "peer copy"
    if any(word in low for word in _SIGNAL_WORDS):
        return "peer signal"
    if any(word in low for word in _COPY_WORDS) or _TRITON_COPY.match(low):
        return "copy"
    return "compute"


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals in order that cover the same time."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def intersection(left: Sequence[Interval], right: Sequence[Interval]) -> float:
    """The time that two lists of disjoint, ordered intervals have in common."""
    total, index = 0.0, 0
    for start, end in left:
        while index < len(right) and right[index][1] <= start:
            index += 1
        position = index
        while position < len(right) and right[position][0] < end:
            total += min(end, right[position][1]) - max(start, right[position][0])
            position += 1
    return total


def analyse(kernels: Sequence[Kernel], num_steps: int) -> dict[str, Any]:
    """Milliseconds a step of each kind of communication, its hidden share, and what the device did otherwise."""
    by_kind: dict[Kind, list[Interval]] = {}
    count: dict[Kind, int] = {}
    for kernel in kernels:
        kind = kernel.kind
        by_kind.setdefault(kind, []).append((kernel.start, kernel.end))
        count[kind] = count.get(kind, 0) + 1
    compute = union(by_kind.get("compute", []))
    per_step = 1e3 * num_steps  # microseconds in all to milliseconds a step

    def row(intervals: list[Interval], number: int) -> dict[str, Any]:
        joined = union(intervals)
        total, hidden = length(joined), intersection(joined, compute)
        return {
            "kernels": number / num_steps,
            "ms": total / per_step,
            "hidden": hidden / total if total else None,
            "exposed_ms": (total - hidden) / per_step,
        }

    kinds = {kind: row(by_kind[kind], count[kind]) for kind in COMMUNICATION if kind in by_kind}
    everything = union((kernel.start, kernel.end) for kernel in kernels)
    span = max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels) if kernels else 0.0
    communication = [interval for kind in kinds for interval in by_kind[kind]]
    return {
        "steps": num_steps,
        "step_ms": span / per_step,
        "communication": row(communication, sum(count[kind] for kind in kinds)),
        "by_kind": kinds,
        "compute_ms": length(compute) / per_step,
        "copy_ms": length(union(by_kind.get("copy", []))) / per_step,
        "copy_kernels": count.get("copy", 0) / num_steps,
        "idle_ms": (span - length(everything)) / per_step,
        "longest": _longest(kernels, num_steps),
    }


def _longest(kernels: Sequence[Kernel], num_steps: int, number: int = 16) -> list[dict[str, Any]]:
    """The names that take most time: what to look at next."""
    totals: dict[tuple[str, Kind], list[float]] = {}
    for kernel in kernels:
        found = totals.setdefault((kernel.name[:120], kernel.kind), [0.0, 0.0])
        found[0] += kernel.end - kernel.start
        found[1] += 1
    order = sorted(totals.items(), key=lambda item: -item[1][0])[:number]
    return [
        {"name": name, "kind": kind, "ms": total / 1e3 / num_steps, "kernels": count / num_steps}
        for (name, kind), (total, count) in order
    ]


def read_trace(path: Path) -> list[Kernel]:
    """The device's work in a trace that torch's profiler exported."""
    events = json.loads(path.read_text())["traceEvents"]
    categories = ("kernel", "gpu_memcpy", "gpu_memset")
    return [
        Kernel(
            event["name"],
            float(event["ts"]),
            float(event["ts"]) + float(event["dur"]),
            int(event.get("args", {}).get("bytes", 0)) if event["cat"] == "gpu_memcpy" else 0,
        )
        for event in events
        if event.get("cat") in categories and "dur" in event
    ]


def profile(step: Callable[[], object], num_steps: int, *, record: bool) -> dict[str, Any] | None:
    """Runs some steps, on the recording rank under the profiler. Returns its numbers there, None elsewhere. Waits for the device."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    torch.cuda.synchronize()
    if not record:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
        return None
    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return analyse(read_trace(path), num_steps)
