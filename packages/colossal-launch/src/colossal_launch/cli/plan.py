"""`colossal plan CONFIG`."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colossal_launch.cli.console import say
from colossal_launch.cli.options import Config, Debug, Overrides

if TYPE_CHECKING:
    from colossal_core.estimate import EstimateTable, HardwareProfile
    from colossal_launch.assembly import Assembly, Setup


def plan(
    config: Config,
    world_size: Annotated[int, typer.Option("--world-size", "-w", min=1, help="Number of ranks to plan for.")] = 1,
    overrides: Overrides = None,
    layouts: Annotated[bool, typer.Option(help="Print the layout of every parameter.")] = False,
    schema: Annotated[bool, typer.Option(help="Print the JSON schema of the config instead.")] = False,
    debug: Debug = False,
) -> int:
    """Prints what would be done, without a GPU and without a process group: mesh, order, layouts, memory.

    Examples:

        colossal plan run.yaml --world-size 64

        colossal plan run.yaml --world-size 8 --set parallel.zero.stage=1 --layouts

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
    assembly = assemble(
        setup, built.module, world_size=world_size, device_type=_device_type(setup), own_loss=_has_own_loss(setup)
    )
    say(assembly.plan.describe())
    for line in memory_lines(assembly):
        say(line)
    if layouts:
        for layout in assembly.plan.layouts.values():
            say(
                f"  {layout.full_name} {list(layout.shape)} compute {layout.compute.cut_axes} state {layout.state.cut_axes}"
            )
    return 0


def _has_own_loss(setup: Setup) -> bool:
    return setup.config.model is not None and setup.config.model.loss is not None


def _device_type(setup: Setup) -> str:
    from colossal_launch.session import choose_device

    return choose_device(setup.config.train.device, 0).type


def memory_lines(assembly: Assembly) -> list[str]:
    """Bytes of each kind of state on the fullest rank, by the strategies' closed forms."""
    found = estimate(assembly)
    names = ("parameter_bytes", "master_bytes", "gradient_bytes", "optimizer_bytes")
    parts = [f"{name.removesuffix('_bytes')} {_bytes(float(found.column(name)[0]))}" for name in names]
    sent = [f"{axis} {_bytes(float(found.column(f'bytes_{axis}')[0]))}" for axis in ("shard", "dp_replicate")]
    return [
        f"memory      {', '.join(parts)} a rank, without activations",
        f"sent        {', '.join(sent)} a rank and step",
    ]


def estimate(assembly: Assembly) -> Any:
    """The estimate table of one plan: one row."""
    import numpy as np

    from colossal_core.estimate import EstimateTable, HardwareProfile, ModelSize
    from colossal_core.precision import precision
    from colossal_core.strategy import Phase

    plan, anatomy = assembly.plan, assembly.anatomy
    chosen = precision(plan.config.precision)
    trained = sum(layout.numel for layout in plan.layouts.values() if layout.trainable)
    blocks = [
        sum(math.prod(fact.shape) for fact in anatomy.parameters if fact.block == block) for block in anatomy.blocks
    ]
    size = ModelSize(
        num_parameters=sum(layout.numel for layout in plan.layouts.values()),
        num_trainable=trained,
        num_blocks=len(blocks),
        block_parameters=max(blocks, default=0),
        hidden_size=anatomy.hidden_size or 0,
        sequence_length=plan.config.data.sequence_length if plan.config.data is not None else 0,
        vocab_size=anatomy.vocab_size or 0,
        num_heads=anatomy.num_heads or 0,
        optimizer_state_elements=assembly.optimizer_state_elements,
    )
    profile = HardwareProfile(
        "any", np.inf, np.inf, np.inf, np.inf, 0.0, chosen.compute.itemsize, chosen.master.itemsize
    )
    stage = getattr(getattr(plan.config.section("parallel"), "zero", None), "stage", 0)
    inputs = {axis: np.array([float(plan.mesh.size(axis))]) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    inputs |= {"zero_stage": np.array([float(stage)]), "micro_size": np.array([float(plan.batch.micro_size)])}
    inputs |= {"num_microbatches": np.array([float(plan.batch.num_microbatches)]), "recompute": np.zeros(1)}
    table = EstimateTable(size, inputs)
    if all(strategy.phase is not Phase.SHARD_STATE for strategy in assembly.strategies):
        table = _whole_state(table, profile)
    for strategy in assembly.strategies:
        table = strategy.estimate(table, profile)
    return table


def _whole_state(table: EstimateTable, profile: HardwareProfile) -> EstimateTable:
    """Bytes of a state that no strategy keeps: all of it is on every rank."""
    import numpy as np

    compute, master = profile.compute_element_bytes, profile.master_element_bytes
    trained = np.full(1, float(table.model.num_trainable))
    table = table.adding("parameter_bytes", compute * trained)
    table = table.adding("gradient_bytes", master * trained)
    table = table.adding("master_bytes", (master if master != compute else 0) * trained)
    states = table.model.optimizer_state_elements
    return table.adding("optimizer_bytes", states * master * trained)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
