"""What a plugin measures of this machine, for `colossal bench`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BenchmarkRequest:
    """What the command line asks for.

    names: of what is measured, all where empty. device: `cuda` or `cpu`. json_file: where the rows are written too. minutes: after which
    nothing more is started; what was measured by then is printed. compared: with what, by name; with all there is where empty.
    num_shapes: how many of the shapes of each, the first ones; 0: all.
    """

    names: tuple[str, ...] = ()
    device: str = "cuda"
    json_file: Path | None = None
    minutes: float = 60.0
    compared: tuple[str, ...] = ()
    num_shapes: int = 0


@dataclass(frozen=True)
class Benchmark:
    """One of a plugin's. name: under which `colossal bench` has it. run(request, say): measures; each line goes to `say` as it is known.

    `run` raises ConfigError for what it cannot measure at all: no such device, no such name.
    """

    name: str
    run: Callable[[BenchmarkRequest, Callable[[str], None]], None]
