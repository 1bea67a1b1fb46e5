"""`colossal verify CONFIG`."""

from __future__ import annotations

from typing import Annotated

import typer

from colossal_launch.cli.console import say
from colossal_launch.cli.options import Config, Debug, Overrides


def verify(
    config: Config,
    world_size: Annotated[
        int, typer.Option("--world-size", "-w", min=1, max=16, help="Ranks to compare with one process.")
    ] = 2,
    overrides: Overrides = None,
    mutant: Annotated[
        str | None, typer.Option(help="Plant a fault, to see that it is caught: the exit status is then 1.")
    ] = None,
    debug: Debug = False,
) -> int:
    """Shows that several ranks compute what one process does: loss, every raw gradient, norm, parameters and optimizer states after three
    steps, in float64, to 1e-12. The model is shrunk; every rank runs on the CPU.

    Examples:

        colossal verify run.yaml --world-size 4

        colossal verify run.yaml --set "model={architecture: gpt2}"

        colossal verify run.yaml --mutant forgotten-all-reduce
    """
    del debug
    from colossal_core.testing import WorkerPool, default_variants, model_size_of
    from colossal_core.testing.verification import verify as run_verification
    from colossal_core.testing.verification import with_mutant
    from colossal_launch.assembly import read_setup
    from colossal_launch.verifying import verification_of

    setup = read_setup(config, overrides or [])
    variants = default_variants(world_size, model_size_of(setup.plugins.axis_sizes(setup.config), world_size))
    found = verification_of(setup)
    for note in found.notes:
        say(f"note: {note}")
    spec = with_mutant(found.spec, mutant)
    with WorkerPool() as pool:
        report = run_verification(spec, world_size, variants, pool)
    say(report.describe())
    return 0 if report.passed else 1
