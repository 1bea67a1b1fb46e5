"""From a config and a model to a plan, and from a plan to a model in training. Used by Booster and by every verb alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_core.config import TrainConfig, parse_config
from colossal_core.optimizers import optimizer_problems
from colossal_core.plugins import Plugins, discover

if TYPE_CHECKING:
    import torch
    from torch import nn

    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.errors import Problem
    from colossal_core.ops import OpTable
    from colossal_core.plan import Plan
    from colossal_core.specimen import Specimen
    from colossal_core.strategy import Strategy


@dataclass(frozen=True)
class Setup:
    """A config, and the plugins that were found for it."""

    config: TrainConfig
    plugins: Plugins


@dataclass(frozen=True)
class Assembly:
    """A plan, and everything that `colossal_core.wrap` needs to carry it out.

    optimizer_state_bytes: bytes of state that the configured optimizer keeps for each trained element.
    """

    plan: Plan
    anatomy: ModelAnatomy
    strategies: tuple[Strategy, ...]
    ops: OpTable
    optimizer_state_bytes: float = 8.0


def read_setup(source: str | Path | Mapping[str, Any] | TrainConfig, overrides: Sequence[str] = ()) -> Setup:
    """Discovers plugins and reads the config with their sections. Raises PluginError or ConfigError with every problem."""
    from colossal_launch.config_file import apply_overrides, read_config_file

    plugins = discover()
    if isinstance(source, TrainConfig):
        if "parallel" not in type(source).model_fields:  # core's own class, without the sections of plugins
            source = parse_config(source.model_dump(mode="json", exclude_unset=True), plugins.config_class())
        return Setup(source, plugins)
    data = source if isinstance(source, Mapping) else read_config_file(source)
    return Setup(parse_config(apply_overrides(data, overrides), plugins.config_class()), plugins)


def assemble(
    setup: Setup,
    model: nn.Module,
    *,
    world_size: int,
    device_type: str,
    own_optimizer: bool = False,
    example_batch: Mapping[str, torch.Tensor] | None = None,
    known_problems: Sequence[Problem] = (),
    own_loss: bool = False,
) -> Assembly:
    """The plan of a model (its parameters may be on the meta device). No process group, no GPU.

    example_batch: of the model's forward; None: what `model.example_batch` names, or none (transformers' models need none).
    own_optimizer: the user hands one to `boost`, so that the `optimizer` section is not its recipe. own_loss: the user's `loss_fn` reads
    the model's outputs, an auxiliary loss among them.

    Raises: ConfigError with every problem of every strategy.
    """
    from colossal_core.examine import examine
    from colossal_core.ops import OP_NAMES, build_op_table, op_problems
    from colossal_core.plan import make_plan
    from colossal_core.precision import precision_of

    config = setup.config
    problems = list(known_problems)
    if not own_optimizer:
        problems += optimizer_problems(config, setup.plugins.optimizers())
    example = example_batch if example_batch is not None else example_batch_of(config)
    anatomy = examine(model, example, factory_specimen(config, example))
    if own_loss:
        anatomy = replace(anatomy, auxiliary_loss=False, own_loss=True)
    dtype = str(precision_of(config).compute).removeprefix("torch.")
    found, asked = setup.plugins.ops(), config.ops.asked(OP_NAMES)
    problems += op_problems(found, device_type, dtype, asked)
    ops = build_op_table(found, device_type, dtype, asked)
    strategies = setup.plugins.active(config)
    sizes = setup.plugins.axis_sizes(config)
    plan = make_plan(config, anatomy, strategies, sizes, ops, world_size=world_size, known_problems=problems)
    spec = setup.plugins.optimizers().get(config.optimizer.name)
    master_bytes = precision_of(config).master.itemsize
    state_bytes = spec.state_bytes(config.optimizer, master_bytes) if spec is not None else 2.0 * master_bytes
    return Assembly(plan, anatomy, strategies, ops, state_bytes)


def factory_specimen(config: TrainConfig, example: Mapping[str, torch.Tensor] | None) -> Specimen | None:
    """The small model that the user's own factory makes with `model.verify_config`; None where core makes one by rule."""
    section = config.model
    if section is None or section.factory is None or section.verify_config is None or example is None:
        return None
    from colossal_launch.models.factory_specimen import FactorySpecimen

    return FactorySpecimen(section.factory, {**section.config, **section.verify_config}, example)


def example_batch_of(config: TrainConfig) -> Mapping[str, torch.Tensor] | None:
    """The batch of two sequences of `model.example_batch`. The random state is left as it was."""
    if config.model is None or config.model.example_batch is None:
        return None
    import torch

    from colossal_launch.models.building import import_function

    function = import_function(config.model.example_batch, "model.example_batch")
    with torch.random.fork_rng(devices=[]):
        batch: Mapping[str, torch.Tensor] = function(2)
    return batch
