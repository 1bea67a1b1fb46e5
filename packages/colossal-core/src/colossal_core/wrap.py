"""Carrying out a plan on a model: strategies in the order of their phases, then the values, then the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from colossal_core.errors import raise_problems
from colossal_core.foreign_optimizer import ForeignOptimizer
from colossal_core.gathering import gathering_problems, install_gathering
from colossal_core.local_state import LocalState
from colossal_core.loss import LossFunction, LossOwner
from colossal_core.mesh import WORLD
from colossal_core.model_ops.replacing import replace_ops
from colossal_core.modules import ParameterSlots, cast_buffers, settle_buffers
from colossal_core.optimizers import OptimizerFactory, OptimizerSpec, build_optimizer
from colossal_core.plan import Plan, check_fingerprints
from colossal_core.precision import LossScale, precision_of
from colossal_core.rank_compute import COMPUTE_PHASES, AsItIs, absent_parameters, hook_ids
from colossal_core.runner import ProgramRunner
from colossal_core.schedule import SavedScheduler, own_schedule_problems, rates_from_config
from colossal_core.step import StepEngine
from colossal_core.strategy import ApplyContext, Phase, Strategy
from colossal_core.streams import ModelRandom
from colossal_core.trained import Exporter, Trained

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.collectives import Collectives
    from colossal_core.ops import OpTable

Values = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Parts:
    """What the user hands over beside the model. All of it may be left out.

    optimizer: an instance on the model's parameters, a factory, or None (the config's). scheduler: a torch learning-rate scheduler
    of that optimizer. loss_fn: (outputs, batch) -> (sum of losses, items). values: (full name, full value) of parameters that the model
    holds on the meta device, in any order; drawn or read one at a time. exporter: writes a Hugging Face folder for `export_hf`.
    """

    optimizer: torch.optim.Optimizer | OptimizerFactory | None = None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    loss_fn: LossFunction | None = None
    values: Values | None = None
    exporter: Exporter | None = None


def wrap(
    model: nn.Module,
    plan: Plan,
    anatomy: ModelAnatomy,
    strategies: Sequence[Strategy],
    collectives: Collectives,
    ops: OpTable,
    specs: Mapping[str, OptimizerSpec],
    parts: Parts,
) -> Trained:
    """The model in training on this rank. Ranks compare their plans before anything else, and start from the first rank's values.

    Communication: one gather of 16 bytes over all ranks, one broadcast of every parameter and buffer that is not on the meta device, then
    whatever the strategies need. Raises: ConfigError for an optimizer or a scheduler that does not fit, and for a model
    that another run gathers.
    """
    raise_problems([*gathering_problems(model), *own_schedule_problems(plan.config, parts.optimizer, parts.scheduler)])
    check_fingerprints(collectives.gather_bytes(plan.fingerprint.encode(), WORLD, tag="plan"), plan.fingerprint)
    context = _context(model, plan, anatomy, collectives, ops)
    random = ModelRandom(model, plan.config.train.seed)
    context.replayed.append(random.dropout)
    context.dropout = random.dropout
    real = {fact.full_name: model.get_parameter(fact.full_name).detach() for fact in anatomy.parameters}
    own_hooks = hook_ids(model)
    replace_ops(model, plan, anatomy, context)
    for phase in Phase:
        if phase is Phase.OPTIMIZER:
            break
        for strategy in strategies:
            if strategy.phase is phase:
                strategy.apply(model, plan, context)
        if phase is COMPUTE_PHASES[-1]:
            absent = absent_parameters(plan, context.coordinate)
            context.computes = AsItIs(hook_ids(model) - own_hooks, context.cross_entropy, absent)
        if phase is Phase.SHARD_STATE and context.parameters is None:
            context.parameters = LocalState(
                context.slots, plan.layouts, context.precision, context.device, plan.mesh, context.coordinate
            )
    _place_absent(plan, context)
    _materialise(model, context, real, parts.values)
    install_gathering(model, plan, anatomy, context.parameter_state())
    optimizer = build_optimizer(parts.optimizer, plan.config, specs, context)
    for strategy in strategies:
        if strategy.phase is Phase.OPTIMIZER:
            strategy.apply(model, plan, context)
    loss_owner = LossOwner(anatomy, context.ops, parts.loss_fn, context.cross_entropy)
    set_rates: Callable[[int], None] = _keep_rates
    if parts.optimizer is None:
        set_rates = rates_from_config(optimizer, plan.config.scheduler, plan.config.train.num_steps)
    loss_scale = LossScale(context.device) if context.precision.scaled else None
    runner = ProgramRunner(model, plan, context, loss_owner, random, loss_scale)
    engine = StepEngine(model, plan, context, optimizer, loss_owner, runner, loss_scale, set_rates)
    trained = Trained(engine, strategies, parts.exporter)
    if isinstance(optimizer, ForeignOptimizer):
        trained.attach("optimizer_groups", optimizer)
    if parts.scheduler is not None:
        scheduler = parts.scheduler
        trained.attach("lr_scheduler", SavedScheduler(scheduler))
        trained.on_step(lambda result: scheduler.step())
    return trained


def _keep_rates(step: int) -> None:
    """The rates of a user's own optimizer are the user's (and the scheduler's that was handed over with it)."""
    del step


def _context(
    model: nn.Module, plan: Plan, anatomy: ModelAnatomy, collectives: Collectives, ops: OpTable
) -> ApplyContext:
    names = {id(model.get_parameter(fact.full_name)): fact.full_name for fact in anatomy.parameters}
    return ApplyContext(
        collectives=collectives,
        coordinate=collectives.mesh.coordinate(collectives.rank),
        device=collectives.device,
        precision=precision_of(plan.config),
        ops=ops,
        seed=plan.config.train.seed,
        names=names,
        slots=ParameterSlots(model, [fact.names for fact in anatomy.parameters]),
        units=plan.units_by_use,
        blocks=plan.block_names,
    )


def _place_absent(plan: Plan, context: ApplyContext) -> None:
    """Parameters of other stages of a pipeline: zeros of the full shape that take no memory, for what reads them only to throw it away."""
    for name, layout in plan.layouts.items():
        if not layout.compute.is_present(context.coordinate):
            zero = torch.zeros((), dtype=context.slots.dtype(name), device=context.device)
            if zero.is_floating_point():
                zero = zero.to(context.precision.compute)
            context.slots.place(name, zero.expand(layout.shape)).requires_grad_(False)


def _materialise(model: nn.Module, context: ApplyContext, real: dict[str, torch.Tensor], values: Values | None) -> None:
    """Fills every parameter: from the model's own values where they are real, else from `values`, one tensor at a time.

    Ranks may have drawn different numbers for a real model (nobody seeds for one GPU): the first rank's are everybody's.
    """
    state = context.parameter_state()
    missing = {name for name, value in real.items() if value.is_meta and name in state.shards}
    for name in list(real):
        value = real.pop(name)
        if not value.is_meta:
            state.fill(name, _of_first_rank(value, context))
    for name, value in values if values is not None else ():
        if name in missing:
            state.fill(name, value)
            missing.discard(name)
    assert not missing, f"no values for parameters on the meta device: {sorted(missing)[:3]}"
    settle_buffers(model, context.device, lambda buffer: _of_first_rank(buffer, context))
    if context.precision.throughout:
        cast_buffers(model, torch.float64)


def _of_first_rank(value: torch.Tensor, context: ApplyContext) -> torch.Tensor:
    """The value that rank 0 has, on the device. Communication: a broadcast of its bytes over all ranks, which any dtype can take."""
    if context.collectives.mesh.world_size == 1:
        return value.to(context.device)
    copied = value.to(context.device, copy=True).contiguous()
    context.collectives.start_broadcast(copied.reshape(-1).view(torch.uint8), WORLD, tag="initial values").wait()
    return copied
