"""Data parallelism beside torch's DDP and FSDP2: the same model, attention, loss, compilation and batch, in one run.

    python benchmarks/zero_vs_peers.py --model gpt2-1.5b --processes 4 --micro-batches 8,32 --out runs/zero-vs-peers
    python benchmarks/zero_vs_peers.py --model llama-8b --contestants fsdp2-z3,fsdp2-z2,zero3,zero3-keep --micro-batches 1,2
    python benchmarks/zero_vs_peers.py --model llama-1b --contestants zero1,zero3 --optimizers adamw,muon --micro-batches 4
    python benchmarks/zero_vs_peers.py --model tiny --processes 2 --micro-batches 2 --compile no      # on a laptop

Prints a row as soon as it is known, then the whole table; writes `NAME.json`, `NAME.png` and `NAME.log` into the folder. Options of
`parallel.zero` follow a contestant's name: `zero3+prefetch=2`. A row that fails, hangs or runs out of memory is reported, and the others
are measured in new processes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--contestants", default="ddp,fsdp2-z3,fsdp2-z2,zero1,zero2,zero3,zero3-keep")
    parser.add_argument("--micro-batches", default="8,32", help="sequences a GPU and step")
    parser.add_argument("--optimizers", default="adamw", help="peers run adamw only")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/zero-vs-peers"))
    parser.add_argument("--name", help="of the files; the model's where none is given")
    parser.add_argument("--profile", default="", help="contestants to profile after timing, or all")
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
    parser.add_argument("--date", default="", help="written into the report")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    given = parse()
    from zero.worker import Task, work

    if given.worker is not None:
        work(Task.from_json(given.worker))
    from zero.measure import Timing
    from zero.models import shapes
    from zero.picture import draw
    from zero.report import Report
    from zero.rows import all_rows, problems
    from zero.supervise import Limits, Supervisor

    if given.model not in shapes():
        print(f"--model: {given.model} is none of {', '.join(shapes())}")
        return 2
    sizes = [int(size) for size in given.micro_batches.split(",")]
    contestants, optimizers = given.contestants.split(","), given.optimizers.split(",")
    modes, compiled = given.recompute.split(","), [word == "yes" for word in given.compile.split(",")]
    rows = all_rows(given.model, contestants, sizes, optimizers, modes, compiled)
    found = problems(rows)
    if found:
        print("\n".join(found))
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    name = given.name or given.model
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    report = Report(shapes()[given.model], asked, given.out / f"{name}.json")
    print(report.head(), flush=True)
    started = time.monotonic()
    limits = Limits(60 * given.minutes, given.row_seconds)
    supervisor = Supervisor(Path(__file__), given.processes, limits, given.out / f"{name}.log", report.add)
    profiled = tuple(contestants) if given.profile == "all" else tuple(given.profile.split(","))
    timing = Timing(given.warmup_steps, given.timed_steps)
    supervisor.run(Task(tuple(rows), "", timing, profiled, given.memory_estimate))
    print()
    report.print_table()
    print(f"{time.monotonic() - started:.0f} s in all", flush=True)
    draw(json.loads(report.path.read_text()), given.out / f"{name}.png")
    return 1 if any("failed" in result for _, result in report.rows) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main())
