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
    microbatches: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Microbatches of a step. Default: 2; with a pipeline twice its size and one.",
            show_default=False,
        ),
    ] = None,
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

        colossal verify run.yaml --world-size 4 --set parallel.pipeline.size=2 --microbatches 4

        colossal verify run.yaml --mutant forgotten-all-reduce
    """
    del debug
    from colossal_core.testing import WorkerPool, default_variants, model_size_of, num_microbatches_of
    from colossal_core.testing.verification import verify as run_verification
    from colossal_core.testing.verification import with_mutant
    from colossal_launch.assembly import read_setup
    from colossal_launch.verifying import verification_of

    setup = read_setup(config, overrides or [])
    axis_sizes = setup.plugins.axis_sizes(setup.config)
    count = num_microbatches_of(axis_sizes) if microbatches is None else microbatches
    variants = default_variants(world_size, model_size_of(axis_sizes, world_size), count)
    if microbatches is not None:  # a schedule from a file is for this number
        variants = tuple(variant for variant in variants if variant.num_microbatches == count)
    found = verification_of(setup)
    for note in found.notes:
        say(f"note: {note}")
    spec = with_mutant(found.spec, mutant)
    with WorkerPool() as pool:
        report = run_verification(spec, world_size, variants, pool)
    say(report.describe())
    return 0 if report.passed else 1
