"""What `colossal bench kernels` does."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from colossal_core.benchmarks import BenchmarkRequest
from colossal_core.errors import ConfigError, Problem
from colossal_core.ops import OP_NAMES, OpImplementation
from colossal_kernels.bench.case import OpBench
from colossal_kernels.bench.clock import Clock, CpuClock, CudaClock, measured_ceilings
from colossal_kernels.bench.measure import DeviceLostError, Row, Workbench
from colossal_kernels.bench.report import bandwidth, fastest, formulas, head, line, summary, to_json
from colossal_kernels.interpreting import interpreted

CASES = f"{__package__}.cases"
COMPOSED = ("fp8_linear",)
"""What is made of several ops."""


def known_benches() -> dict[str, OpBench]:
    """By op, in the order in which a training step meets them. An op is measured when `cases/` has a file of its name."""
    found = {}
    for op in (*OP_NAMES, *COMPOSED):
        if importlib.util.find_spec(f"{CASES}.{op}") is not None:
            found[op] = importlib.import_module(f"{CASES}.{op}").BENCH
    return found


@dataclass
class Run:
    """One run of the benchmark: what it measures with, and what it has found."""

    request: BenchmarkRequest
    workbench: Workbench
    say: Callable[[str], None]
    rows: list[Row]
    started: float

    def out_of_time(self) -> bool:
        return time.monotonic() - self.started > 60 * self.request.minutes


def run(request: BenchmarkRequest, say: Callable[[str], None]) -> None:
    """Measures, prints each row as it is known, then the formulas and a summary.

    Raises ConfigError where there is nothing to measure: no such op, no GPU, no Triton.
    """
    benches = chosen(request)
    implementations = available(request.device)
    require_something(request, implementations)
    device = torch.device(request.device)
    clock: Clock = CudaClock(device) if device.type == "cuda" else CpuClock()
    machine = described(device)
    say(", ".join(f"{key} {value}" for key, value in machine.items()))
    ceilings = measured_ceilings(clock, device)
    product = f", product {ceilings.matmul / 1e12:.0f} TFLOP/s (8192^3, bf16)" if ceilings.matmul else ""
    say(f"ceilings: copy {bandwidth(ceilings.copy)} (read and written){product}\n\n{head()}")
    bench = Workbench(clock, ceilings, device, implementations, request.compared)
    running = Run(request, bench, say, [], time.monotonic())
    lost = ""
    try:
        measure_all(running, benches.values())
    except DeviceLostError as failure:
        lost = f"stopped: the device does not answer any more: {failure}"
    finally:
        if request.json_file is not None:
            request.json_file.write_text(to_json(running.rows, ceilings, machine), encoding="utf-8")
    say("\n" + "\n".join(formulas(running.rows)) + "\n")
    say("\n".join(summary(running.rows, ceilings)))
    if lost:
        raise ConfigError(
            [Problem("bench kernels", lost, "start it again, and leave out the op whose row failed last")]
        )


def measure_all(running: Run, benches: Iterable[OpBench]) -> None:
    for bench in benches:
        shapes = bench.shapes_on(running.request.device)[: running.request.num_shapes or None]
        for shape in shapes:
            if running.out_of_time():
                running.say(f"no time left for {bench.op} {shape.label}")
                continue
            found: list[Row] = []
            for row in running.workbench.rows(bench, shape):
                found.append(row)
                running.rows.append(row)
                mine = fastest(one for one in found if one.ours and one.direction == row.direction)
                running.say(line(row, mine, running.workbench.ceilings))


def chosen(request: BenchmarkRequest) -> dict[str, OpBench]:
    """The benches that are asked for, of those for the device."""
    known = known_benches()
    here = {op: bench for op, bench in known.items() if bench.shapes_on(request.device)}
    problems = [
        Problem(
            "OPS",
            f"not measured on {request.device}; there are {', '.join(here) or 'none'}",
            "choose among these",
            name,
        )
        for name in request.names
        if name not in here
    ]
    if request.device not in ("cuda", "cpu"):
        problems = [Problem("--device", "cuda or cpu", "choose one of these", request.device)]
    if problems:
        raise ConfigError(problems)
    return {op: here[op] for op in (request.names or here)}


def available(device_type: str) -> list[OpImplementation]:
    """Ours for this device, in bfloat16 or, on a CPU, float32. Not the interpreted ones, which are for tests."""
    from colossal_kernels.table import implementations

    dtype = "bfloat16" if device_type == "cuda" else "float32"
    found = [entry for entry in implementations() if entry.fits(device_type, dtype)]
    return (
        []
        if device_type == "cuda" and interpreted()
        else [entry for entry in found if entry.provider != "triton" or not interpreted()]
    )


def require_something(request: BenchmarkRequest, implementations: Sequence[OpImplementation]) -> None:
    reason, remedy = "", ""
    if request.device == "cuda" and not torch.cuda.is_available():
        reason = "there is nothing to measure: this machine has no CUDA device that torch can use"
        remedy = "run it on one, or measure the CPU's kernels with --device cpu"
    elif request.device == "cuda" and importlib.util.find_spec("triton") is None:
        reason = "there is nothing to measure: Triton is not installed, and the references serve"
        remedy = "install torch's CUDA build, which brings it"
    elif not implementations:
        reason = "there is nothing to measure: no kernel of ours runs here"
        remedy = "see `colossal doctor`, or choose another device"
    if reason:
        raise ConfigError([Problem("--device", reason, remedy, request.device)])


def described(device: torch.device) -> dict[str, Any]:
    """What the numbers hold for."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        found |= {
            "triton": triton.__version__,
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
        }
        found |= {"memory GiB": round(properties.total_memory / (1 << 30), 1), "cuda": torch.version.cuda}
    else:
        found |= {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return found | {"liger": _version("liger-kernel"), "cut-cross-entropy": _version("cut-cross-entropy")}


def _version(distribution: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"
