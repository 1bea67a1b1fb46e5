"""What makes a plan impossible, whoever made it: what core refuses itself, and what strategies may not do to one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from colossal_core.errors import Problem
from colossal_core.mesh import LOSS_AXES
from colossal_core.program import WHOLE, missing_parts
from colossal_core.strategy import Phase

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.config import TrainConfig
    from colossal_core.mesh import MeshLayout
    from colossal_core.plan import PlanDraft
    from colossal_core.strategy import Strategy


def core_problems(
    config: TrainConfig, anatomy: ModelAnatomy, strategies: Sequence[Strategy], mesh: MeshLayout
) -> Iterable[Problem]:
    """What no run of core can do, with any strategies."""
    holders = [strategy.name for strategy in strategies if strategy.phase is Phase.SHARD_STATE]
    if mesh.size(LOSS_AXES) > 1 and not holders:
        reason = f"data parallelism over {mesh.size(LOSS_AXES)} ranks needs the package colossal-zero, which is not installed"
        yield Problem("parallel.zero", reason, "pip install colossal-zero")
    if not any(fact.trainable for fact in anatomy.parameters):
        yield Problem("model", "has no parameter with requires_grad", "unfreeze what is to be trained")
    for fact in anatomy.parameters:
        if fact.dtype.startswith("complex"):
            reason = f"holds the parameter {fact.full_name} of dtype {fact.dtype}, and training is in real numbers"
            yield Problem("model", reason, "hold it as real parameters (torch.view_as_real)")
    if anatomy.batch_statistics and mesh.size(LOSS_AXES) > 1:
        name, ranks = anatomy.batch_statistics[0], mesh.size(LOSS_AXES)
        reason = f"{name} normalises over the batch, of which each of the {ranks} ranks has another part"
        remedy = "use GroupNorm or LayerNorm, or put it into evaluation mode before boosting (its statistics are then constants)"
        yield Problem("model", reason, remedy)
    if anatomy.auxiliary_loss:
        reason = "the model returns an auxiliary loss beside the logits, whose unit is not declared"
        yield Problem(
            "model.config.output_router_logits", reason, "set it to false, or pass loss_fn and add the term there", True
        )
    if config.precision == "fp16" and config.train.non_finite == "stop" and config.was_set("train.non_finite"):
        yield Problem(
            "train.non_finite", "fp16 skips steps whose gradients overflow", "leave it out or use skip", "stop"
        )


def conflicts(
    strategy: Strategy,
    names: frozenset[str],
    touched: Mapping[tuple[Phase, str], tuple[str, frozenset[str], tuple[str, ...]]],
) -> Iterable[Problem]:
    """Two strategies that touch one parameter in one phase. names: that this one changed; touched: by those before it."""
    for (phase, other), (_, other_names, other_after) in touched.items():
        both = sorted(names & other_names)
        if phase is strategy.phase and both and other not in strategy.after and strategy.name not in other_after:
            reason = f"touches {both[0]} in phase {phase.name.lower()}, as {other} does"
            yield Problem(
                f"strategy {strategy.name}", reason, f"declare after=({other!r},) in one of them, or use one only"
            )


def layout_problems(draft: PlanDraft) -> Iterable[Problem]:
    """Gradients that would be summed twice, or over an axis where they are whole."""
    for layout in draft.layouts.values():
        unknown = set(layout.state.partial) - set(layout.compute.partial)
        if unknown:
            reason = f"is to be summed over {sorted(unknown)}, where its gradient is not partial"
            yield Problem(f"layout of {layout.full_name}", reason, "this is a mistake in a strategy's plan: report it")
        twice = set(layout.state.partial) & set(layout.state.cut_axes)
        if twice:
            reason = f"is cut along {sorted(twice)} and still partial over it"
            yield Problem(f"layout of {layout.full_name}", reason, "this is a mistake in a strategy's plan: report it")


def program_problems(draft: PlanDraft) -> Iterable[Problem]:
    """A program that does not fit the mesh and the batch, or asks a block for a part that it cannot run in."""
    program, own = draft.program, "this is a mistake in a strategy's plan: report it"
    if len(program.actions) != draft.mesh.size("pp"):
        reason = f"has actions for {len(program.actions)} pipeline ranks, and there are {draft.mesh.size('pp')}"
        yield Problem("program", reason, own)
    if program.num_microbatches != draft.batch.num_microbatches:
        reason = f"is for {program.num_microbatches} microbatches, and a step has {draft.batch.num_microbatches}"
        yield Problem("program", reason, own)
    every = [action for actions in program.actions for action in actions]
    unknown = sorted(str(action) for action in every if action.block or action.kind in ("gather", "release"))
    if unknown:
        reason = f"has actions on single blocks, or that gather or release ({unknown[0]}), which the runner does not carry out"
        yield Problem("program", reason, own)
    if program.num_stages == 1 and missing_parts(program, WHOLE):
        yield Problem("program", "cuts backward passes in two without stages, which nobody waits for", own)
    if missing_parts(program, WHOLE):
        yield from _whole_backends(draft)


def _whole_backends(draft: PlanDraft) -> Iterable[Problem]:
    """Backends that make one backward graph, under a program that cuts backward passes."""
    from colossal_core.split_compiled import IN_TWO

    for backend in sorted({*draft.decisions.get("compile", {}).values()} - {*IN_TWO}):
        reason = "makes one backward graph of a block, and the schedule cuts backward passes in two"
        yield Problem(
            "compile.backend", reason, f"use {', '.join(IN_TWO)}, or a schedule with whole backward passes", backend
        )
