"""How fast collectives are here: latency, algorithm bandwidth and bus bandwidth by operation and size.

With n ranks, S the bytes of the full tensor (the sum, the gathered, the scattered or the exchanged one) and t the mean seconds of one
call: algorithm bandwidth = S / t, bus bandwidth = algorithm bandwidth x factor, the factor being what a rank sends divided by S
(2 (n-1)/n for all_reduce; (n-1)/n for all_gather, reduce_scatter, all_to_all; 1 for broadcast and exchange), so that it can be
compared with the link's own speed. The definitions are those of NVIDIA's nccl-tests (doc/PERFORMANCE.md).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from colossal_core.collectives import Transfer
from colossal_core.errors import ConfigError, Problem
from colossal_core.mesh import WORLD

if TYPE_CHECKING:
    import torch

    from colossal_core.collectives import Axes, Collectives, Handle

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "exchange")


@dataclass(frozen=True)
class BenchRow:
    """One measurement. size_bytes: of the full tensor, rounded up to whole float32 elements for each rank."""

    operation: str
    num_ranks: int
    size_bytes: int
    latency_us: float
    algorithm_gb_s: float
    bus_gb_s: float


def bus_factor(operation: str, num_ranks: int) -> float:
    """Bus bandwidth divided by algorithm bandwidth."""
    if operation in ("broadcast", "exchange"):
        return 1.0
    share = (num_ranks - 1) / num_ranks
    return 2 * share if operation == "all_reduce" else share


def bench_collectives(
    collectives: Collectives,
    sizes_bytes: Sequence[int] = (4096, 1 << 20, 16 << 20),
    operations: Sequence[str] = OPERATIONS,
    *,
    axes: Axes = WORLD,
    num_calls: int = 10,
    num_warmup: int = 2,
) -> list[BenchRow]:
    """Times each operation at each size, one call after the other; every rank calls it and gets the slowest rank's numbers.

    Raises ConfigError for an unknown operation and for a group of one rank.
    """
    problems = [
        Problem("operations", f"not one of {', '.join(OPERATIONS)}", "choose among these", name)
        for name in operations
        if name not in OPERATIONS
    ]
    if collectives.size(axes) == 1:
        problems.append(Problem("axes", "one rank has nobody to talk to", "start at least two processes", axes))
    if problems:
        raise ConfigError(problems)
    return [
        _measure(collectives, name, size, axes, num_calls, num_warmup) for name in operations for size in sizes_bytes
    ]


def _measure(
    collectives: Collectives, operation: str, size_bytes: int, axes: Axes, num_calls: int, num_warmup: int
) -> BenchRow:
    import torch

    num_ranks = collectives.size(axes)
    count = max(1, -(-size_bytes // (4 * num_ranks)))
    full = torch.zeros(count * num_ranks, device=collectives.device)
    start = _starter(collectives, operation, full, count, axes)
    for _ in range(num_warmup):
        start().wait()
    _synchronize(collectives.device)
    collectives.barrier(axes, tag="bench")
    began = time.perf_counter()
    for _ in range(num_calls):
        start().wait()
    _synchronize(collectives.device)
    seconds = torch.tensor([(time.perf_counter() - began) / num_calls], dtype=torch.float64, device=collectives.device)
    collectives.start_all_reduce(seconds, axes, op="max", use="control", tag="bench").wait()
    mean = float(seconds.item())
    bandwidth = full.nbytes / mean / 1e9
    return BenchRow(
        operation, num_ranks, full.nbytes, mean * 1e6, bandwidth, bandwidth * bus_factor(operation, num_ranks)
    )


def _starter(
    collectives: Collectives, operation: str, full: torch.Tensor, count: int, axes: Axes
) -> Callable[[], Handle]:
    import torch

    place, num_ranks = collectives.index(axes), collectives.size(axes)
    own, other = full[place * count : (place + 1) * count], torch.empty_like(full)
    ring = [Transfer("send", full, (place + 1) % num_ranks), Transfer("receive", other, (place - 1) % num_ranks)]
    starters: dict[str, Callable[[], Handle]] = {
        "all_reduce": lambda: collectives.start_all_reduce(full, axes, tag="bench"),
        "all_gather": lambda: collectives.start_all_gather(full, own, axes, tag="bench"),
        "reduce_scatter": lambda: collectives.start_reduce_scatter(own, full, axes, tag="bench"),
        "all_to_all": lambda: collectives.start_all_to_all(other, full, axes, tag="bench"),
        "broadcast": lambda: collectives.start_broadcast(full, axes, tag="bench"),
        "exchange": lambda: collectives.start_exchange(ring, axes, tag="bench"),
    }
    return starters[operation]


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def format_rows(rows: Sequence[BenchRow]) -> str:
    """The measurements as aligned text."""
    lines = [f"{'operation':<15}{'ranks':>6}{'bytes':>14}{'latency us':>13}{'algorithm GB/s':>16}{'bus GB/s':>10}"]
    lines += [
        f"{row.operation:<15}{row.num_ranks:>6}{row.size_bytes:>14,}{row.latency_us:>13.1f}"
        f"{row.algorithm_gb_s:>16.2f}{row.bus_gb_s:>10.2f}"
        for row in rows
    ]
    return "\n".join(lines)


def rows_to_json(rows: Sequence[BenchRow]) -> str:
    """The measurements as a JSON array of objects."""
    return json.dumps([asdict(row) for row in rows], indent=2)
