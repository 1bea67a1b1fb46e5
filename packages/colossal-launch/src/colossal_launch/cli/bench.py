"""`colossal bench`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from colossal_launch.cli.console import say
from colossal_launch.cli.options import Debug, Processes

application = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@application.callback()
def bench() -> None:
    """Measures this machine.

    Examples:

        colossal bench comm --processes 2

        colossal bench kernels rms_norm swiglu
    """


@application.command("comm")
def comm(
    processes: Processes = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_bytes: Annotated[int, typer.Option(min=1024, help="Largest message, in bytes.")] = 1 << 24,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here too.")] = None,
    debug: Debug = False,
) -> int:
    """Times every collective between local ranks: latency, algorithm and bus bandwidth, with the formula of each.

    Examples:

        colossal bench comm --processes 2

        colossal bench comm --processes 4 --device cuda --max-bytes 268435456 --json comm.json
    """
    from colossal_comm.environment import read_environment
    from colossal_launch.cli.train import local_processes
    from colossal_launch.run.agent import Entry, run_workers

    if read_environment().world_size > 1:
        measure(device, max_bytes, json_file)
        return 0
    arguments = ("-m", "colossal_launch.cli.bench", device, str(max_bytes), str(json_file or ""))
    count = max(local_processes(processes, None, device), 2)
    return run_workers(Entry(arguments), count, port=0, timeout=timedelta(minutes=3))


@application.command("kernels")
def kernels(
    ops: Annotated[
        list[str] | None, typer.Argument(help="Ops to measure; all where none is named.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here too.")] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="After which nothing more is started.")] = 60.0,
    compared: Annotated[
        str, typer.Option(help="With what, separated by commas: eager, compile, liger, cce; default: all there is.")
    ] = "",
    shapes: Annotated[int, typer.Option(min=0, help="How many shapes of each op, the first ones; 0: all.")] = 0,
    debug: Debug = False,
) -> int:
    """Times the kernels of every op: time, bandwidth, share of the ceilings, memory, error, and what torch and others take.

    Examples:

        colossal bench kernels

        colossal bench kernels rms_norm cross_entropy --compared eager,compile --shapes 1 --json kernels.json

        colossal bench kernels --device cpu
    """
    from colossal_core.benchmarks import BenchmarkRequest
    from colossal_core.errors import ConfigError, Problem
    from colossal_core.plugins import discover

    found = discover().benchmarks().get("kernels")
    if found is None:
        reason = "no installed plugin has kernels to measure"
        raise ConfigError([Problem("bench kernels", reason, "pip install colossal-kernels")])
    names = tuple(name for name in compared.split(",") if name)
    found.run(BenchmarkRequest(tuple(ops or ()), device, json_file, minutes, names, shapes), say)
    return 0


def measure(device: str, max_bytes: int, json_file: Path | None) -> None:
    """One rank of the measurement. Rank 0 prints the table."""
    from colossal_comm.bench import bench_collectives, format_rows, rows_to_json
    from colossal_core.mesh import MeshLayout
    from colossal_launch import session

    ranks = session.launch(device)
    collectives = session.collectives_for(MeshLayout((1, 1, ranks.world_size, 1, 1)), ranks.device)
    sizes = [size for size in (1 << power for power in range(10, 40, 2)) if size <= max_bytes]
    rows = bench_collectives(collectives, sizes)
    if ranks.rank == 0:
        say(format_rows(rows))
        if json_file is not None:
            json_file.write_text(rows_to_json(rows), encoding="utf-8")
    session.finish()


def main() -> None:
    import sys

    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def run() -> None:
        measure(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]) if sys.argv[3] else None)

    run()


if __name__ == "__main__":
    main()
