"""The benchmark's engine without a GPU: interpreted kernels, tiny shapes, and a clock that says what it is told to."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from colossal_core.benchmarks import BenchmarkRequest
from colossal_core.errors import ConfigError
from colossal_core.ops import OP_NAMES
from colossal_kernels.bench import clock, command, report, sweep
from colossal_kernels.bench.case import Call, Draw, Knobs, Least, OpBench, Shape, moved, multiplied
from colossal_kernels.bench.clock import Ceilings, Sample, measured_ceilings
from colossal_kernels.bench.measure import Row, Workbench
from colossal_kernels.bench.outcome import distance
from colossal_kernels.table import TRITON, implementations

CEILINGS = Ceilings(
    copy=4e12, matmul=8e14, copy_of=lambda num_bytes: 3e12 if num_bytes < 1 << 20 else 4e12, device_name="NVIDIA H200"
)


class ToldClock:
    """Runs each call once and says that it took the next of these milliseconds."""

    def __init__(self, *milliseconds: float) -> None:
        self._left = list(milliseconds)

    def sample(self, call: Callable[[], object], prepare: Callable[[], object] | None = None) -> Sample:
        if prepare is not None:
            prepare()
        call()
        taken = self._left.pop(0) if self._left else 1.0
        return Sample(taken, taken, taken, 0.0)

    def extra_bytes(self, call: Callable[[], object]) -> int:
        call()
        return 3 << 20


def tiny(**changes: Any) -> OpBench:
    """RMS normalisation of [3, 8] in float32, beside its formula."""
    shape = Shape(
        "3 x 8 fp32",
        lambda draw: Call((draw.normal(3, 8, dtype=torch.float32), draw.normal(8, dtype=torch.float32), 1e-6)),
        {"forward": moved(3 * 10**6, "2 E", goal_ms=0.5), "backward": Least(3 * 10**6, "3 E")},
    )
    bench = OpBench(
        "rms_norm", (shape,), eager=lambda x, weight, eps: weight * x / (x.square().mean(-1, True) + eps).sqrt()
    )
    return replace(bench, **changes)


def rows_of(bench: OpBench, *milliseconds: float) -> list[Row]:
    own = [found for found in implementations() if found.op == bench.op]
    workbench = Workbench(ToldClock(*milliseconds), CEILINGS, torch.device("cpu"), own)
    return list(workbench.rows(bench, bench.shapes[0]))


def test_rows_have_time_memory_error_and_ratio() -> None:
    rows = rows_of(tiny(), 1.0, 2.0, 3.0, 8.0)
    assert [(row.contestant, row.direction, row.ours, row.median_ms) for row in rows] == [
        ("triton", "forward", True, 1.0),
        ("triton", "backward", True, 2.0),
        ("eager", "forward", False, 3.0),
        ("eager", "backward", False, 8.0),
    ]
    assert [row.failed for row in rows] == [""] * 4
    assert all(0 < row.error < 1e-6 and row.extra_bytes == 3 << 20 for row in rows)
    assert rows[0].bytes_per_s == 3e9
    text = report.line(rows[2], rows[0], CEILINGS)
    assert text.startswith("| rms_norm forward 3 x 8 fp32 | eager | 3 | 1 GB/s | 0 | 0 | 3 | ")
    assert text.endswith(" | 3.00 x as fast |")
    assert report.summary(rows, CEILINGS) == [
        "rms_norm forward 3 x 8 fp32: triton 1 ms, 3 GB/s, 0 % of a copy as large; 3.00 x eager (3 ms); "
        "GOAL MISSED: 0.5 ms; GOAL MISSED: 85 %",
        "rms_norm backward 3 x 8 fp32: triton 2 ms, 1.5 GB/s, 0 % of a copy as large; 4.00 x eager (8 ms)",
        "rms_norm: 3.50 x the fastest other in the median; no shape lost",
    ]
    assert report.formulas(rows) == ["rms_norm forward: 2 E", "rms_norm backward: 3 E"]


def test_a_shape_that_is_lost_is_named() -> None:
    rows = rows_of(tiny(), 1.0, 2.0, 0.9, 4.0)
    assert report.summary(rows, CEILINGS)[-1] == (
        "rms_norm: 1.45 x the fastest other in the median; LOST: forward 3 x 8 fp32 (0.90)"
    )


def test_products_are_held_against_the_product() -> None:
    least = multiplied(10**12, "2 N^3", goal_ms=2.0, goal_extra_bytes=1 << 20)
    row = Row("rms_norm", "here", "forward", "triton", True, least, 2.0, 2.0, 2.0, 0.0, 0, math.nan, 4e12)
    assert report.share_of_ceiling(row, CEILINGS) == 0.625
    assert report.line(row, row, CEILINGS) == (
        "| rms_norm forward here | triton | 2 | 500 TFLOP/s | 62 | - | 0 | - | 0.000 | - |"
    )
    assert report.missed_goals(row, CEILINGS) == []
    assert report.missed_goals(replace(row, extra_bytes=3 << 20, median_ms=3.0), CEILINGS) == [
        "GOAL MISSED: 2 ms",
        "GOAL MISSED: 1 MiB more, 3 here",
    ]


def test_a_peer_that_is_not_there_has_no_row_and_one_that_fails_says_why() -> None:
    def missing() -> Any:
        raise ImportError("nobody")

    def broken() -> Any:
        def call(*arguments: Any) -> None:
            message = "does not\nfit"
            raise RuntimeError(message)

        return call

    rows = rows_of(tiny(eager=None, peers={"missing": missing, "broken": broken}))
    assert [(row.contestant, row.failed) for row in rows[2:]] == [
        ("broken", "RuntimeError: does not fit"),
        ("broken", "RuntimeError: does not fit"),
    ]
    assert (
        report.line(rows[2], rows[0], CEILINGS)
        == "| rms_norm forward 3 x 8 fp32 | broken | RuntimeError: does not fit |"
    )


def test_a_wrong_result_is_seen() -> None:
    (row, *_) = [row for row in rows_of(tiny(eager=lambda x, weight, eps: x * weight)) if row.contestant == "eager"]
    assert row.error > 0.1
    truth = [torch.ones(4), torch.arange(3)]
    assert distance([torch.ones(4), torch.arange(3)], truth) == 0.0
    assert distance([torch.full((4,), 1.5), torch.arange(3)], truth) == 0.5
    assert distance([torch.full((4,), math.nan), torch.arange(3)], truth) == math.inf
    assert distance([torch.ones(4), torch.ones(3, dtype=torch.int64)], truth) == math.inf
    assert distance([torch.ones(4)], truth) == math.inf


def test_arguments_that_are_overwritten_are_given_back() -> None:
    seen: list[float] = []

    def spoils(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        seen.append(float(x.detach().sum()))
        y = weight * x
        x.data.zero_()
        return y

    rows_of(tiny(shapes=(replace(tiny().shapes[0], restored=True),), eager=spoils, compared="nothing"))
    first = float(tiny().shapes[0].call(Draw(torch.device("cpu"))).arguments[0].detach().sum())
    assert seen.count(first) >= 3


def test_a_repetition_in_which_the_device_waited_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([(9.0, True), (8.0, True), (1.0, False), (3.0, False), *[(7.0, True)] * 9])
    flushed: list[int] = []

    def once(self: object, call: object, prepare: object, flushes: int) -> tuple[float, bool]:
        flushed.append(flushes)
        return next(told)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(clock, "FLUSHED_BYTES", 4)
    monkeypatch.setattr(clock.CudaClock, "_once", once)
    found = clock.CudaClock(torch.device("cpu"), repeats=3).sample(lambda: None)
    assert (found.lowest_ms, found.median_ms, found.highest_ms) == (1.0, 3.0, 7.0), "a host that is always late ends it"
    assert flushed == [1, 2, 4, 4, 4, 8, 16, 32, 40]


def test_ceilings_are_measured_in_the_same_way() -> None:
    found = measured_ceilings(ToldClock(1000.0, 2.0), torch.device("cpu"))
    assert (found.copy, found.matmul) == (float(1 << 28), 0.0)
    assert found.copy_of(4000) == found.copy_of(4000) == 2e6


def test_json_has_the_rows_and_what_follows_from_them() -> None:
    rows = rows_of(tiny(), 1.0, 2.0, 3.0, 8.0)
    found = json.loads(report.to_json(rows, CEILINGS, {"device": "none"}))
    assert found["ceilings"] == {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14}
    assert found["rows"][0]["missed_goals"] == ["GOAL MISSED: 0.5 ms", "GOAL MISSED: 85 %"]
    assert found["rows"][0]["share_of_ceiling"] == 3e9 / 4e12
    assert [row["contestant"] for row in found["rows"]] == ["triton", "triton", "eager", "eager"]


def test_the_whole_command_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [found for found in implementations() if found.op == "rms_norm"]
    monkeypatch.setattr(command, "known_benches", lambda: {"rms_norm": replace(tiny(), cpu_shapes=tiny().shapes)})
    monkeypatch.setattr(command, "available", lambda device_type: own)
    monkeypatch.setattr(command, "measured_ceilings", lambda clock, device: CEILINGS)
    said: list[str] = []
    command.run(BenchmarkRequest((), "cpu", tmp_path / "rows.json"), said.append)
    assert said[1].startswith("ceilings: copy 4.000 TB/s (read and written), product 800 TFLOP/s (8192^3, bf16)")
    assert len([one for one in said if one.startswith("| rms_norm")]) == 4
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4
    said.clear()
    command.run(BenchmarkRequest((), "cpu", minutes=-1.0), said.append)
    assert "no time left for rms_norm 3 x 8 fp32" in said


def test_where_there_is_nothing_to_measure_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(request: BenchmarkRequest) -> str:
        with pytest.raises(ConfigError) as caught:
            command.run(request, print)
        return str(caught.value)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(BenchmarkRequest()) == (
        "--device='cuda': there is nothing to measure: this machine has no CUDA device that torch can use: run it on one, or measure the "
        "CPU's kernels with --device cpu"
    )
    assert refused(BenchmarkRequest(("rms_norm",), "tpu")) == "--device='tpu': cuda or cpu: choose one of these"
    assert refused(BenchmarkRequest(("rmsnorm",))).startswith("OPS='rmsnorm': not measured on cuda; there are rms_norm")


@dataclass(frozen=True)
class Tile:
    block: int
    warps: int


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A module with a constant and a function, and another that has imported the function by name."""
    home, user = ModuleType("colossal_kernels.a_config"), ModuleType("colossal_kernels.a_kernel")
    vars(home).update(PROGRAMS=264, config=lambda columns: Tile(columns, 8))
    vars(user).update(config=vars(home)["config"])
    monkeypatch.setitem(sys.modules, home.__name__, home)
    monkeypatch.setitem(sys.modules, user.__name__, user)
    return home, user


def test_settings_are_put_in_place_and_taken_back(kernels: tuple[Any, Any]) -> None:
    home, user = kernels
    before = dict(vars(home)), dict(vars(user))
    setting = {"a_config:config.warps": 3, "a_config:PROGRAMS": 7}
    with sweep.overridden(setting):
        assert (home.PROGRAMS, home.config(64), user.config(32)) == (7, Tile(64, 3), Tile(32, 3))
    with sweep.overridden({"a_config:config": Tile(1, 1)}):
        assert user.config(64) == Tile(1, 1)
    with sweep.overridden({"a_config:config.warps": 3, "a_config:config.block": 5}):
        assert user.config(64) == Tile(5, 3)
    assert sweep.told(setting) == "config.warps=3, PROGRAMS=7"
    with pytest.raises(AttributeError), sweep.overridden({**setting, "a_config:NOBODY": 1}):
        pass
    assert (dict(vars(home)), dict(vars(user))) == before


def test_a_sweep_ranks_settings_and_leaves_out_what_is_wrong(kernels: tuple[Any, Any]) -> None:
    home, _ = kernels

    def scaled(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        assert home.PROGRAMS is not None, "does not fit"
        return torch.nn.functional.rms_norm(x, (8,), weight, eps) * (2.0 if home.PROGRAMS == 3 else 1.0)

    knobs = Knobs(("backward",), {"a_config:PROGRAMS": (1, 2, 3, None)})
    bench = tiny(knobs=(knobs,))
    searching = sweep.Sweep(bench, scaled, ToldClock(4.0, 2.0, 8.0), torch.device("cpu"), math.inf)
    assert [direction for _, direction, _ in sweep.searched(bench)] == ["backward"]
    trials = searching.trials(bench.shapes[0], "backward", knobs)
    assert [trial.milliseconds for trial in trials] == [4.0, 2.0, 8.0, 1.0, math.inf]
    assert [trial.good for trial in trials] == [True, True, True, False, False]
    assert sweep.table("rms_norm", trials, 1) == [
        "rms_norm: 5 tried, 2 failed or less exact",
        "    2.0000 ms  x 2.000  PROGRAMS=1",
        "    4.0000 ms  x 1.000  as it is",
    ]


def test_every_announced_op_is_measured_and_every_knob_is_there() -> None:
    known = command.known_benches()
    missing = [entry.op for entry in TRITON if entry.op not in known]
    assert missing == []
    assert [op for op in known if op not in (*OP_NAMES, *command.COMPOSED)] == []
    for bench in known.values():
        assert len(bench.shapes) >= 3, bench.op
        labels = [shape.label for shape in bench.shapes]
        assert len(set(labels)) == len(labels), bench.op
        for knobs in bench.knobs:
            directions = {direction for shape in bench.shapes for direction in shape.least}
            assert set(knobs.directions) <= directions, bench.op
            with sweep.overridden({place: values[0] for place, values in knobs.values.items()}):
                pass
