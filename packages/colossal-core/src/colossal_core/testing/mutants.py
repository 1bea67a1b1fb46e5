"""Planted faults: mistakes that distributed training code really has, each of which the suites and `colossal verify` must reject.

A fault changes what one run does, not the code: it stands between the run and its collectives, or hooks into its step. One process
is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from colossal_core.collectives import DoneHandle
from colossal_core.errors import ConfigError, Problem
from colossal_core.gradients import clip_factor
from colossal_core.mesh import LOSS_AXES, WORLD
from colossal_core.testing import pipeline_faults

if TYPE_CHECKING:
    from colossal_core.collectives import Axes, Collectives, Handle, ReduceOp
    from colossal_core.plan import Plan
    from colossal_core.strategy import StepView
    from colossal_core.trained import Trained

ITEMS_TAG = "items"
CORE_TAGS = (ITEMS_TAG, "loss and norm")
"""What core itself sums with use `reduce`; every other such sum is of gradients."""

Change = Callable[["Trained"], None]
Applies = Callable[["Plan"], bool]


@dataclass(frozen=True)
class ReductionFault:
    """What happens to reductions. of: the gradients of the first bucket, of all, of parameters that several stages hold, or the count of
    items. skip: nothing is sent.

    before, after: (tensor, number of ranks, plan) -> None, on what goes in and on what has come out.
    """

    of: Literal["first gradients", "gradients", "shared gradients", "items"]
    skip: bool = False
    before: Callable[[torch.Tensor, int, Plan], None] | None = None
    after: Callable[[torch.Tensor, int, Plan], None] | None = None


def _always(plan: Plan) -> bool:
    return plan.mesh.world_size > 1


@dataclass(frozen=True)
class Mutant:
    """One planted fault. applies: whether it changes anything under a plan (there is no shard to misplace in stage 0)."""

    name: str
    summary: str
    reduction: ReductionFault | None = None
    hook: Change | None = None
    applies: Applies = _always

    def wrap_collectives(self, collectives: Collectives, plan: Plan) -> Collectives:
        """The collectives that the run gets."""
        if self.reduction is None or not self.applies(plan):
            return collectives
        return cast("Collectives", _FaultyCollectives(collectives, self.reduction, plan))

    def change(self, trained: Trained) -> None:
        """Plants the fault in a run that is about to start."""
        if self.hook is not None and self.applies(trained.plan):
            self.hook(trained)


def plant(name: str) -> Mutant:
    """The fault of a name. Raises: ConfigError with the known names."""
    found = next((mutant for mutant in MUTANTS if mutant.name == name), None)
    if found is None:
        known = ", ".join(mutant.name for mutant in MUTANTS)
        raise ConfigError([Problem("--mutant", "there is no such planted fault", f"use one of {known}", name)])
    return found


class _FaultyCollectives:
    """Collectives whose sums are wrong in one way; everything else is handed on."""

    def __init__(self, inner: Collectives, fault: ReductionFault, plan: Plan) -> None:
        self._inner, self._fault, self._plan = inner, fault, plan
        self._first_tag: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _hit(self, axes: Axes, use: str, tag: str) -> bool:
        if self._inner.size(axes) == 1 or use != "reduce":
            return False
        if self._fault.of == "items":
            return tag == ITEMS_TAG
        if tag in CORE_TAGS:
            return False
        is_shared = pipeline_faults.over_stages(axes)
        if is_shared or self._fault.of == "shared gradients":
            # Never "first gradients": what comes first differs from stage to stage, and all ranks of a group must do the same.
            return is_shared and self._fault.of in ("gradients", "shared gradients")
        if self._first_tag is None:
            self._first_tag = tag
        return self._fault.of == "gradients" or tag == self._first_tag

    def _run(
        self, given: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], axes: Axes, begin: Callable[[], Handle]
    ) -> Handle:
        fault, ranks = self._fault, self._inner.size(axes)
        if fault.before is not None:
            for tensor in given:
                fault.before(tensor, ranks, self._plan)
        handle = DoneHandle() if fault.skip else begin()
        then = [] if fault.after is None else [partial(fault.after, tensor, ranks, self._plan) for tensor in outputs]
        return _Finishing(handle, then)

    def start_all_reduce(
        self, tensor: torch.Tensor, axes: Axes, *, op: ReduceOp = "sum", use: str = "reduce", tag: str = ""
    ) -> Handle:
        def begin() -> Handle:
            return self._inner.start_all_reduce(tensor, axes, op=op, use=use, tag=tag)

        return self._run([tensor], [tensor], axes, begin) if self._hit(axes, use, tag) else begin()

    def start_all_reduce_coalesced(
        self, tensors: Sequence[torch.Tensor], axes: Axes, *, use: str = "reduce", tag: str = ""
    ) -> Handle:
        def begin() -> Handle:
            return self._inner.start_all_reduce_coalesced(tensors, axes, use=use, tag=tag)

        return self._run(tensors, tensors, axes, begin) if self._hit(axes, use, tag) else begin()

    def start_reduce_scatter(
        self, output: torch.Tensor, tensor: torch.Tensor, axes: Axes, *, use: str = "reduce", tag: str = ""
    ) -> Handle:
        def begin() -> Handle:
            return self._inner.start_reduce_scatter(output, tensor, axes, use=use, tag=tag)

        if not self._hit(axes, use, tag):
            return begin()
        if self._fault.skip:
            own = tensor.chunk(self._inner.size(axes))[self._inner.index(axes)]
            if own.data_ptr() != output.data_ptr():
                output.copy_(own)
        return self._run([tensor], [output], axes, begin)


class _Finishing:
    """A handle that does something more when the work is done."""

    def __init__(self, inner: Handle, then: Sequence[Callable[[], None]]) -> None:
        self._inner, self._then = inner, list(then)

    def wait(self) -> None:
        self._inner.wait()
        while self._then:
            self._then.pop()()

    def is_done(self) -> bool:
        return self._inner.is_done()


def _double(tensor: torch.Tensor, ranks: int, plan: Plan) -> None:
    del ranks, plan
    tensor.mul_(2)


def _divide(tensor: torch.Tensor, ranks: int, plan: Plan) -> None:
    del plan
    tensor.div_(ranks)


def _multiply(tensor: torch.Tensor, ranks: int, plan: Plan) -> None:
    del plan
    tensor.mul_(ranks)


def _clip_alone(tensor: torch.Tensor, ranks: int, plan: Plan) -> None:
    del ranks
    max_norm = plan.config.optimizer.max_grad_norm
    assert max_norm is not None
    tensor.mul_(clip_factor(tensor.norm(), max_norm))


def _shift_shards(trained: Trained) -> None:
    state = trained._engine.state
    finish = state.finish_reduce

    def shifted() -> None:
        finish()
        for shard in state.shards.values():
            if shard.layout.state.flat is not None and shard.gradient is not None and shard.gradient.numel() > 1:
                shard.gradient.copy_(shard.gradient.roll(1))

    vars(state)["finish_reduce"] = shifted


def _lose_a_microbatch(trained: Trained) -> None:
    state = trained._engine.state
    begin = state.begin_backward
    num_begun = [0]

    def forget(view: StepView) -> None:
        num_begun[0] = 0

    def after_clearing(*, last: bool, units: Collection[str] | None = None) -> None:
        if num_begun[0] == 1:
            state.begin_step()
        num_begun[0] += 1
        begin(last=last, units=units)

    trained._engine.context.hooks.add("before_step", forget)
    vars(state)["begin_backward"] = after_clearing


def _keep_old_parameters(trained: Trained) -> None:
    engine = trained._engine
    collectives, state = engine.context.collectives, engine.state
    if collectives.rank != collectives.mesh.size(WORLD) - 1:
        return
    old: dict[str, torch.Tensor] = {}

    def remember(view: StepView) -> None:
        old.update({name: shard.parameter.detach().clone() for name, shard in state.shards.items()})

    def bring_back(view: StepView) -> None:
        state.wait_published()
        with torch.no_grad():
            for name, shard in state.shards.items():
                shard.parameter.copy_(old[name])

    engine.context.hooks.add("before_optimizer", remember)
    engine.context.hooks.add("after_step", bring_back)


def _everyone_owns(trained: Trained) -> None:
    for shard in trained._engine.state.shards.values():
        shard.layout = replace(shard.layout, state=replace(shard.layout.state, replicated=()))


def _one_step_ahead(trained: Trained) -> None:
    for state in trained._engine.optimizer.state_tensors():
        if state.kind.endswith(".step"):
            state.tensor.add_(1)


def _is_sharded(plan: Plan) -> bool:
    return _always(plan) and any(layout.state.flat is not None for layout in plan.layouts.values())


def _has_copies(plan: Plan) -> bool:
    trained = (layout for layout in plan.layouts.values() if layout.trainable)
    return _always(plan) and any(layout.state.replicated for layout in trained)


def _sums_in_a_stage(plan: Plan) -> bool:
    """Ranks of one and the same stage have different parts of its gradients."""
    return plan.mesh.world_size > plan.mesh.size("pp")


def _sums_gradients(plan: Plan) -> bool:
    return _sums_in_a_stage(plan) or pipeline_faults.shares_between_stages(plan)


def _accumulates(plan: Plan) -> bool:
    return _always(plan) and plan.batch.num_microbatches > 1


def _shares_data(plan: Plan) -> bool:
    return plan.mesh.size(LOSS_AXES) > 1


def _clips(plan: Plan) -> bool:
    """Sums over tensor ranks alone are of a few vectors, mostly too short to be clipped."""
    return _shares_data(plan) and plan.config.optimizer.max_grad_norm is not None


def _is_adamw(plan: Plan) -> bool:
    return _always(plan) and plan.config.optimizer.name == "adamw"


PIPELINE_MUTANTS: tuple[Mutant, ...] = (
    Mutant("halved-crossing-gradient", "gradients that come back from the next stage count half",
           hook=pipeline_faults.halve_crossing_gradients, applies=pipeline_faults.has_stages),
    Mutant("repeated-microbatch", "a stage is given the first microbatch's activations twice", hook=pipeline_faults.repeat_a_microbatch,
           applies=pipeline_faults.passes_several),
    Mutant("forgotten-shared-sum", "gradients of what several stages hold are not summed over them",
           ReductionFault("shared gradients", skip=True), applies=pipeline_faults.shares_between_stages),
)  # fmt: skip
"""Faults that only a pipeline has."""

MUTANTS: tuple[Mutant, ...] = (
    Mutant("forgotten-all-reduce", "one bucket of gradients is not summed over ranks", ReductionFault("first gradients", skip=True),
           applies=_sums_in_a_stage),
    Mutant("doubled-gradient", "one bucket of gradients is summed twice", ReductionFault("first gradients", after=_double),
           applies=_sums_in_a_stage),
    Mutant("mean-of-ranks", "gradients are averaged over ranks instead of summed", ReductionFault("gradients", after=_divide),
           applies=_sums_gradients),
    Mutant("local-divisor", "each rank divides its loss by its own count", ReductionFault("items", skip=True, before=_multiply),
           applies=_shares_data),
    Mutant("clip-before-sum", "each rank clips its gradients before they are summed", ReductionFault("gradients", before=_clip_alone),
           applies=_clips),
    Mutant("shard-off-by-one", "shards hold their neighbour's elements", hook=_shift_shards, applies=_is_sharded),
    Mutant("lost-microbatch", "gradients are cleared after the first microbatch", hook=_lose_a_microbatch, applies=_accumulates),
    Mutant("stale-parameters", "the last rank goes on with the parameters from before the step", hook=_keep_old_parameters),
    Mutant("doubled-norm", "the norm counts every copy of a shard", hook=_everyone_owns, applies=_has_copies),
    Mutant("late-bias-correction", "AdamW's bias correction is off by one step", hook=_one_step_ahead, applies=_is_adamw),
    *PIPELINE_MUTANTS,
)  # fmt: skip
"""Every planted fault, by the name that `colossal verify --mutant` takes."""
