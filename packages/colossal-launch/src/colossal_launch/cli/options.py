"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(help="A YAML config.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Change the config: `section.key=value`, the value as YAML. May be repeated.", show_default=False
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes", "-n", min=1, help="Local workers. Default: train.processes, else one for each accelerator."
    ),
]
Port = Annotated[
    int, typer.Option(min=0, max=65535, help="Port of the workers' store on 127.0.0.1; 0 takes a free one.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
