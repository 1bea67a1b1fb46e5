"""The command line that the benchmarks share, and what they do with it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beside_peers.kinds import spelled_out
from beside_peers.measure import Timing
from beside_peers.models import shapes
from beside_peers.picture import draw
from beside_peers.report import AGREEMENT, Report
from beside_peers.rows import Row, all_rows, problems
from beside_peers.supervise import Limits, Supervisor
from beside_peers.time_lines import draw as draw_time_lines
from beside_peers.worker import Task, work


@dataclass(frozen=True)
class Benchmark:
    """One entry script. description: its help. beside: the contestant that the table compares with; "" for the fastest peer. defaults: of
    its command line, by option name. small: other defaults, for `--small`.
    """

    script: Path
    description: str
    beside: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)


def main(benchmark: Benchmark) -> int:
    """Measures what the command line asks for. Returns the exit status: 1 where a row failed, or rows trained differently."""
    given = parse(benchmark)
    if given.worker is not None:
        work(Task.from_json(given.worker))
    if given.model not in shapes():
        print(f"--model: {given.model} is none of {', '.join(shapes())}")
        return 2
    rows = _rows(given)
    found = problems(rows, given.processes)
    if found:
        print("\n".join(found))
        return 2
    report = measure_all(benchmark, given, rows)
    failed = any("failed" in result for _, result in report.rows)
    return 1 if failed or report.loss_difference() > AGREEMENT else 0


def parse(benchmark: Benchmark) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=benchmark.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help=", ".join(shapes()))
    parser.add_argument("--contestants", help="with options after plus signs; what they are: beside_peers/kinds.py")
    parser.add_argument("--micro-batches", default="8,32", help="sequences a GPU and step")
    parser.add_argument("--sequences", type=int, help="a step, in the place of --micro-batches")
    parser.add_argument("--optimizers", default="adamw", help="peers run adamw only")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name", help="of the files; the model's where none is given")
    parser.add_argument("--profile", default="", help="contestants to profile after timing, or all, or ours")
    parser.add_argument(
        "--memory-estimate", action="store_true", help="the library's estimate beside the measured peak"
    )
    parser.add_argument("--recompute", default="none", help="none, full, or both: of every block, for everybody")
    parser.add_argument("--compile", default="yes", help="yes, no, or both: of every block and of the loss")
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--timed-steps", type=int, default=10)
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="of everything; what is not measured by then is said"
    )
    parser.add_argument("--row-seconds", type=float, default=150.0, help="of one row, compilation included")
    if benchmark.small:
        parser.add_argument(
            "--small", action="store_true", help="a small model on two ranks, in a minute or two on a CPU"
        )
    parser.add_argument("--date", default="", help="written into the report")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.set_defaults(**benchmark.defaults)
    if benchmark.small and parser.parse_known_args()[0].small:
        parser.set_defaults(**benchmark.small)
    return parser.parse_args()


def _rows(given: argparse.Namespace) -> list[Row]:
    if given.sequences is not None:
        sizes = [given.sequences // given.processes]
    else:
        sizes = [int(size) for size in given.micro_batches.split(",")]
    optimizers = given.optimizers.split(",")
    contestants = [spelled_out(name, given.processes) for name in given.contestants.split(",")]
    modes, compiled = given.recompute.split(","), [word == "yes" for word in given.compile.split(",")]
    return all_rows(given.model, contestants, sizes, optimizers, modes, compiled)


def _profiled(given: argparse.Namespace, rows: list[Row]) -> tuple[str, ...]:
    if given.profile in ("all", "ours"):
        return tuple(dict.fromkeys(row.contestant for row in rows if given.profile == "all" or not row.is_peer))
    return tuple(spelled_out(name, given.processes) for name in given.profile.split(","))


def measure_all(benchmark: Benchmark, given: argparse.Namespace, rows: list[Row]) -> Report:
    """Prints the rows as they come, then the table; writes the report, its picture and the ranks' log."""
    given.out.mkdir(parents=True, exist_ok=True)
    name = given.name or given.model
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    report = Report(shapes()[given.model], asked, given.out / f"{name}.json", benchmark.beside)
    print(report.head(), flush=True)
    started = time.monotonic()
    limits = Limits(60 * given.minutes, given.row_seconds)
    supervisor = Supervisor(benchmark.script, given.processes, limits, given.out / f"{name}.log", report.add)
    timing = Timing(given.warmup_steps, given.timed_steps)
    supervisor.run(Task(tuple(rows), "", timing, _profiled(given, rows), given.memory_estimate))
    print()
    report.print_table()
    print(f"{time.monotonic() - started:.0f} s in all", flush=True)
    written = json.loads(report.path.read_text())
    draw(written, given.out / f"{name}.png")
    draw_time_lines(written, given.out / f"{name}-time-lines.png")
    return report
