"""`colossal run SCRIPT`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from colossal_core.errors import ConfigError, Problem
from colossal_launch.cli.options import Debug, Port, Processes


def run(
    context: typer.Context,
    script: Annotated[
        Path, typer.Argument(help="A Python script that calls `colossal_launch.launch()`.", show_default=False)
    ],
    processes: Processes = None,
    port: Port = 0,
    debug: Debug = False,
) -> int:
    """Runs your own training script on local workers; what follows the script's name is handed to it.

    Examples:

        colossal run my_training.py --processes 2

        colossal run my_training.py --lr 1e-3
    """
    from colossal_comm.environment import read_environment
    from colossal_launch.cli.train import local_processes
    from colossal_launch.run.agent import Entry, run_workers

    if not script.is_file():
        raise ConfigError([Problem("SCRIPT", "there is no such file", "give the path of a Python script", str(script))])
    environment = read_environment()
    if environment.world_size > 1:
        reason = f"the environment already describes {environment.world_size} ranks ({environment.launcher})"
        raise ConfigError([Problem("colossal run", reason, f"start the script itself: python {script}")])
    entry = Entry(("-m", "colossal_launch.run.script", str(script), *context.args))
    count = local_processes(processes, None, "auto")
    return run_workers(entry, count, port=port, timeout=timedelta(minutes=3))
