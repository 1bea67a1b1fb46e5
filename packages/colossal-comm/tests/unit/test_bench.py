"""The benchmark's rows, formulae, table and errors, on simulated ranks."""

from __future__ import annotations

import json

import pytest
import torch

from colossal_comm import BenchRow, bench_collectives, run_simulated
from colossal_comm.bench import OPERATIONS, bus_factor, format_rows, rows_to_json
from colossal_core.collectives import SingleProcess
from colossal_core.errors import ConfigError
from colossal_core.mesh import MeshLayout


def test_every_operation_is_measured_alike_on_all_ranks() -> None:
    mesh = MeshLayout((1, 1, 2, 1, 1))
    first, second = run_simulated(mesh, lambda collectives: bench_collectives(collectives, [4, 1000], num_calls=2))
    assert first == second
    assert [(row.operation, row.size_bytes) for row in first] == [
        (name, size) for name in OPERATIONS for size in (8, 1000)
    ]
    for row in first:
        assert row.num_ranks == 2 and row.latency_us > 0
        assert row.algorithm_gb_s == pytest.approx(row.size_bytes / row.latency_us / 1e3, rel=1e-9)
        assert row.bus_gb_s == row.algorithm_gb_s * bus_factor(row.operation, 2)


def test_table_and_json() -> None:
    row = BenchRow("all_reduce", 8, 1 << 20, 123.45, 8.4939, 14.864)
    assert format_rows([row]) == (
        "operation       ranks         bytes   latency us  algorithm GB/s  bus GB/s\n"
        "all_reduce          8     1,048,576        123.5            8.49     14.86"
    )
    assert json.loads(rows_to_json([row]))[0]["operation"] == "all_reduce"
    assert bus_factor("all_reduce", 8) == 1.75


def test_what_cannot_be_measured() -> None:
    with pytest.raises(ConfigError) as caught:
        bench_collectives(SingleProcess(torch.device("cpu")), operations=["all_sum"], axes="tp")
    assert str(caught.value).splitlines() == [
        "operations='all_sum': not one of all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, exchange: choose among these",
        "axes='tp': one rank has nobody to talk to: start at least two processes",
    ]
