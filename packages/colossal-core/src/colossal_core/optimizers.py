"""Optimizers: core's own two, how a plugin announces others, and how a user's own is bound to the masters that this rank owns.

An elementwise optimizer updates every element by itself, so that it runs unchanged on any shard. Core's take the clip factor and the
overflow flag into their one pass; a user's is behind the same interface (`foreign_optimizer.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from colossal_core.errors import ConfigError, Problem
from colossal_core.foreign_optimizer import ForeignOptimizer
from colossal_core.ops.adamw import AdamWSettings

if TYPE_CHECKING:
    from colossal_core.config import OptimizerConfig, TrainConfig
    from colossal_core.ops import OpTable
    from colossal_core.shards import ParameterState, Shard

Groups = list[dict[str, Any]]
OptimizerFactory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class ClippingOptimizer(Protocol):
    """An optimizer that folds clipping and skipping into its step: no synchronisation, no copy of the gradients."""

    @property
    def param_groups(self) -> Groups: ...

    def clipped_step(self, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        """clip: 0-d factor of every gradient. skip: 0-d bool; nothing changes where it is true."""

    def state_tensors(self) -> Iterable[tuple[str, torch.nn.Parameter | None, torch.Tensor]]:
        """(kind, parameter or None for what belongs to all, tensor): what a checkpoint holds."""


@dataclass(frozen=True)
class OptimizerSpec:
    """How a plugin announces an optimizer. state_elements: optimizer-state elements kept for each parameter element.

    factory: (parameter groups of masters, config, op table) -> optimizer. elementwise: every element is updated by itself.
    keys: the keys of the `optimizer` section that it reads; writing another one is an error.
    """

    name: str
    factory: Callable[[Groups, OptimizerConfig, OpTable], ClippingOptimizer]
    state_elements: Callable[[OptimizerConfig], int]
    keys: tuple[str, ...]
    elementwise: bool = True


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2) through the op `adamw_step`, on shards of any shape.

    The step count is one 0-d tensor for all parameters, on the device: a skipped step does not advance it.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig, ops: OpTable) -> None:
        defaults = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        super().__init__(groups, defaults)
        self._adamw_step = ops["adamw_step"]
        device = self.param_groups[0]["params"][0].device
        self._step_count = torch.zeros((), dtype=torch.float32, device=device)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None, "closures are not supported: core runs the forward and backward pass"
        self.clipped_step(None, None)

    @torch.no_grad()
    def clipped_step(self, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        self._step_count.add_(1.0 if skip is None else (~skip).to(self._step_count.dtype))
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            settings = AdamWSettings(
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
            self._adamw_step(
                parameters,
                [parameter.grad for parameter in parameters],
                [self.state[parameter]["exp_avg"] for parameter in parameters],
                [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
                settings=settings,
                step=self._step_count,
                clip=clip,
                skip=skip,
            )

    def state_tensors(self) -> Iterable[tuple[str, torch.nn.Parameter | None, torch.Tensor]]:
        yield "adamw.step", None, self._step_count
        for group in self.param_groups:
            for parameter in group["params"]:
                yield "adamw.exp_avg", parameter, self.state[parameter]["exp_avg"]
                yield "adamw.exp_avg_sq", parameter, self.state[parameter]["exp_avg_sq"]


class SGD(torch.optim.Optimizer):
    """Stochastic gradient descent with heavy-ball momentum and L2 weight decay, as torch.optim.SGD has it.

    One departure: the momentum buffer starts at zero instead of at the first gradient, so that it can be saved before the first step;
    with dampening 0 the two are the same.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig, ops: OpTable) -> None:
        del ops
        super().__init__(groups, {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay})
        for group in self.param_groups:
            if group["momentum"]:
                for parameter in group["params"]:
                    self.state[parameter] = {"momentum": torch.zeros_like(parameter)}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None, "closures are not supported: core runs the forward and backward pass"
        self.clipped_step(None, None)

    @torch.no_grad()
    def clipped_step(self, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [cast("torch.Tensor", parameter.grad) for parameter in parameters]
            update = torch._foreach_mul(gradients, clip) if clip is not None else gradients
            if group["weight_decay"]:
                update = torch._foreach_add(update, parameters, alpha=group["weight_decay"])
            if group["momentum"]:
                moments = [self.state[parameter]["momentum"] for parameter in parameters]
                fresh = torch._foreach_add(torch._foreach_mul(moments, group["momentum"]), update)
                update = fresh
                torch._foreach_copy_(moments, _kept_where(skip, moments, fresh))
            torch._foreach_copy_(
                parameters, _kept_where(skip, parameters, torch._foreach_add(parameters, update, alpha=-group["lr"]))
            )

    def state_tensors(self) -> Iterable[tuple[str, torch.nn.Parameter | None, torch.Tensor]]:
        for group in self.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                yield "sgd.momentum", parameter, self.state[parameter]["momentum"]


def _kept_where(
    skip: torch.Tensor | None, old: Iterable[torch.Tensor], new: Iterable[torch.Tensor]
) -> list[torch.Tensor]:
    """The new values, or the old ones where the 0-d flag is true: selected, not multiplied, so that a NaN cannot leak."""
    if skip is None:
        return list(new)
    return [torch.where(skip, before, after) for before, after in zip(old, new, strict=True)]


ADAMW = OptimizerSpec(
    "adamw", AdamW, state_elements=lambda config: 2, keys=("lr", "betas", "eps", "weight_decay", "no_decay")
)
SGD_SPEC = OptimizerSpec(
    "sgd",
    SGD,
    state_elements=lambda config: int(config.momentum > 0),
    keys=("lr", "momentum", "weight_decay", "no_decay"),
)

ALWAYS_KEYS = ("name", "max_grad_norm")
ELEMENTWISE_TORCH = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
"""torch.optim classes whose update is elementwise, read in torch 2.13. Adafactor and Muon read rows, columns or matrices."""


def build_optimizer(
    given: torch.optim.Optimizer | OptimizerFactory | None,
    config: TrainConfig,
    specs: Mapping[str, OptimizerSpec],
    ops: OpTable,
    state: ParameterState,
    names: Mapping[int, str],
) -> ClippingOptimizer:
    """The optimizer over this rank's masters.

    given: an instance with empty state on the user's parameters (re-pointed in place, group settings kept), a factory called with the
    masters, or None (the config's). names: full name by id() of the user's parameter objects.

    Raises: ConfigError for an instance with state, a parameter that is not the model's, config keys beside an optimizer of the user's, an
    optimizer that is not elementwise on sharded masters or whose step needs a closure, and an unknown name.
    """
    shards = [shard for shard in state.shards.values() if shard.layout.trainable]
    if given is None:
        return _from_config(config, specs, ops, shards)
    extra = [key for key in sorted(config.optimizer.model_fields_set) if key not in ("max_grad_norm", "elementwise")]
    if extra and config.was_set("optimizer"):
        reason = "is set beside an optimizer that was handed to boost"
        raise ConfigError(
            Problem(f"optimizer.{key}", reason, "set it on the optimizer, and remove it here") for key in extra
        )
    if isinstance(given, torch.optim.Optimizer):
        _repoint(given, state, names)
        made = given
    else:
        made = given([shard.master for shard in shards])
    _refuse_unfit(made, config, shards)
    return ForeignOptimizer(made, {id(shard.master): shard.layout.full_name for shard in shards})


def _from_config(
    config: TrainConfig, specs: Mapping[str, OptimizerSpec], ops: OpTable, shards: list[Shard]
) -> ClippingOptimizer:
    section = config.optimizer
    spec = specs[section.name]
    if not spec.elementwise and any(shard.layout.state.cut_axes for shard in shards):
        reason = "it does not update every element by itself, and the masters are sharded"
        raise ConfigError(
            [Problem("optimizer.name", reason, "use parallel.zero.stage: 0, or another optimizer", spec.name)]
        )
    decayed = [s.master for s in shards if section.no_decay == "none" or len(s.layout.shape) >= 2]
    rest = [s.master for s in shards if not (section.no_decay == "none" or len(s.layout.shape) >= 2)]
    groups: Groups = [{"params": decayed}] if decayed else []
    if rest:
        groups.append({"params": rest, "weight_decay": 0.0})
    return spec.factory(groups, section, ops)


def optimizer_problems(config: TrainConfig, specs: Mapping[str, OptimizerSpec]) -> Iterable[Problem]:
    """What is wrong with the `optimizer` section when the optimizer comes from it."""
    spec = specs.get(config.optimizer.name)
    if spec is None:
        remedy = f"use one of {', '.join(sorted(specs))}"
        yield Problem("optimizer.name", "no installed package has this optimizer", remedy, config.optimizer.name)
        return
    for key in sorted(config.optimizer.model_fields_set - set(spec.keys) - set(ALWAYS_KEYS)):
        yield Problem(
            f"optimizer.{key}", f"{spec.name} does not read it", f"remove it; {spec.name} reads {', '.join(spec.keys)}"
        )


def _repoint(optimizer: torch.optim.Optimizer, state: ParameterState, names: Mapping[int, str]) -> None:
    """Replaces the user's parameters in every group by the masters of this rank; frozen ones are left out."""
    if optimizer.state:
        raise ConfigError(
            [
                Problem(
                    "optimizer",
                    "the instance handed to boost already has state",
                    "hand over a fresh one; one that makes its state when it is built (Adagrad) as a factory `params -> optimizer`",
                )
            ]
        )
    for group in optimizer.param_groups:
        masters = []
        for parameter in group["params"]:
            if id(parameter) not in names:
                reason = f"holds a parameter of shape {tuple(parameter.shape)} that is not one of the model's"
                raise ConfigError([Problem("optimizer", reason, "build it on model.parameters()")])
            shard = state.shards[names[id(parameter)]]
            if shard.layout.trainable:
                masters.append(shard.master)
        group["params"] = masters


def _refuse_unfit(optimizer: torch.optim.Optimizer, config: TrainConfig, shards: list[Shard]) -> None:
    kind = type(optimizer)
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        reason = f"{kind.__name__}.step needs a closure that runs the model, and core runs it"
        raise ConfigError([Problem("optimizer", reason, "use an optimizer whose step needs none")])
    known = kind.__module__.startswith("torch.optim") and kind.__name__ in ELEMENTWISE_TORCH
    sharded = any(shard.layout.state.cut_axes for shard in shards)
    if sharded and not known and not config.optimizer.elementwise:
        reason = f"{kind.__name__} is not known to update every element by itself, and the masters are sharded"
        remedy = "set optimizer.elementwise: true if it does, or use parallel.zero.stage: 0"
        raise ConfigError([Problem("optimizer", reason, remedy)])
