"""The benchmark on real processes."""

from __future__ import annotations

from typing import Any

from colossal_comm import RankCollectives, bench_collectives
from colossal_core.mesh import MeshLayout


def measure(collectives: RankCollectives) -> list[tuple[str, int]]:
    rows = bench_collectives(collectives, [1024], num_calls=2, num_warmup=1)
    assert all(row.latency_us > 0 for row in rows)
    return [(row.operation, row.size_bytes) for row in rows]


def test_bench_on_gloo(on_gloo: Any) -> None:
    first, second = on_gloo(MeshLayout((1, 1, 2, 1, 1)), measure)
    assert first == second and len(first) == 6
