"""`colossal plan CONFIG`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from colossal_launch.cli.console import say
from colossal_launch.cli.options import Config, Debug, Overrides

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.peak_estimate import PeakEstimator
    from colossal_launch.assembly import Assembly, Setup


def plan(
    config: Config,
    world_size: Annotated[int, typer.Option("--world-size", "-w", min=1, help="Number of ranks to plan for.")] = 1,
    overrides: Overrides = None,
    layouts: Annotated[bool, typer.Option(help="Print the layout of every parameter.")] = False,
    show_schedule: Annotated[
        bool, typer.Option("--show-schedule", help="Print in which order the ranks of a pipeline work, as a time line.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw that time line into a PNG file, too.", show_default=False)
    ] = None,
    schema: Annotated[bool, typer.Option(help="Print the JSON schema of the config instead.")] = False,
    debug: Debug = False,
) -> int:
    """Prints what would be done, without a GPU and without a process group: mesh, order, layouts, memory.

    Examples:

        colossal plan run.yaml --world-size 64

        colossal plan run.yaml --world-size 8 --set parallel.zero.stage=1 --layouts

        colossal plan run.yaml -w 4 --set parallel.pipeline.size=4 --show-schedule --picture schedule.png

        colossal plan run.yaml --schema > colossal.schema.json
    """
    del debug
    from colossal_core.config import json_schema
    from colossal_launch.assembly import assemble, read_setup
    from colossal_launch.run.job import build

    if schema:
        from colossal_core.plugins import discover

        say(json.dumps(json_schema(discover().config_class()), indent=2))
        return 0
    setup = read_setup(config, overrides or [])
    built = build(setup, None, device="cpu")
    device_type = _device_type(setup)
    assembly = assemble(
        setup, built.module, world_size=world_size, device_type=device_type, own_loss=_has_own_loss(setup)
    )
    say(assembly.plan.describe())
    for line in memory_lines(assembly, peak_estimator(setup, assembly, built.module, device_type)):
        say(line)
    if layouts:
        for layout in assembly.plan.layouts.values():
            say(
                f"  {layout.full_name} {list(layout.shape)} compute {layout.compute.cut_axes} state {layout.state.cut_axes}"
            )
    if show_schedule or picture is not None:
        say(schedule_text(setup, assembly, picture))
    return 0


def schedule_text(setup: Setup, assembly: Assembly, picture: Path | None) -> str:
    """The time line of the plan's program, by the strategy that wrote it. picture: the PNG file that gets it too.

    Raises: ConfigError where a picture is asked for and there is no pipeline to draw.
    """
    from colossal_core.errors import ConfigError, Problem

    active = {strategy.name for strategy in assembly.strategies}
    for spec in setup.plugins.strategies():
        if spec.name in active and spec.show_schedule is not None:
            return spec.show_schedule(assembly.plan, assembly.anatomy, picture)
    reason = "the plan has no pipeline: every rank runs its microbatches one after another, each forward and backward"
    if picture is not None:
        raise ConfigError([Problem("--picture", reason, "give parallel.pipeline.size, or leave it out", str(picture))])
    return f"schedule    {reason}"


def _has_own_loss(setup: Setup) -> bool:
    return setup.config.model is not None and setup.config.model.loss is not None


def _device_type(setup: Setup) -> str:
    from colossal_launch.session import choose_device

    return choose_device(setup.config.train.device, 0).type


def memory_lines(assembly: Assembly, estimator: PeakEstimator) -> list[str]:
    """Bytes of each kind on the fullest rank at the peak of a step, and bytes sent; along pp where there is a pipeline."""
    from colossal_core.memory_report import in_units, peak_lines

    table = estimator.table()
    axes = ("shard", "dp_replicate", *(("pp",) if assembly.plan.mesh.size("pp") > 1 else ()), "tp")
    sent = [f"{axis} {in_units(int(table.column(f'bytes_{axis}')[0]))}" for axis in axes]
    return [
        f"memory      of one rank, {assembly.plan.batch.micro_size} sequences at once, by estimate:",
        *peak_lines(estimator.estimate()),
        f"sent        {', '.join(sent)} a rank and step",
    ]


def peak_estimator(setup: Setup, assembly: Assembly, model: nn.Module, device_type: str) -> PeakEstimator:
    """What estimates the plan of a config. Its batch is text of the configured length, else that of `model.example_batch`."""
    import torch

    from colossal_comm import silent_rank
    from colossal_core.loss import LossOwner
    from colossal_core.peak_estimate import PeakEstimator
    from colossal_core.rank_compute import rank_compute
    from colossal_launch.assembly import example_batch_of
    from colossal_launch.models.building import import_function

    config = setup.config
    named = config.model.loss if config.model is not None else None
    loss_fn = import_function(named, "model.loss") if named is not None else None
    batch = example_batch_of(config)
    if batch is None and config.data is not None:
        tokens = torch.empty((1, config.data.sequence_length), dtype=torch.long, device="meta")
        batch = {"input_ids": tokens, "labels": tokens}
    return PeakEstimator(
        model,
        assembly.plan,
        assembly.strategies,
        LossOwner(assembly.anatomy, assembly.ops, loss_fn),
        batch,
        state_bytes=assembly.optimizer_state_bytes,
        device_type=device_type,
        computes=rank_compute(assembly.plan, assembly.strategies, silent_rank(assembly.plan.mesh)),
    )
