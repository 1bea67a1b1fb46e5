"""Mistakes of pipelines, planted into the links between the stages of one run: `mutants.py` names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from colossal_core.collectives import Axes
    from colossal_core.plan import Plan
    from colossal_core.program import Action
    from colossal_core.stage_links import Payload
    from colossal_core.trained import Trained

SHARED = "shared:"
"""What the names of sets of stages begin with that hold one and the same parameter."""

Tensors = tuple[torch.Tensor, ...]
Received = Callable[["Payload", "Action", Tensors], Tensors]


def has_stages(plan: Plan) -> bool:
    return plan.program.num_stages > 1


def passes_several(plan: Plan) -> bool:
    return has_stages(plan) and plan.batch.num_microbatches > 1


def over_stages(axes: Axes) -> bool:
    """Whether a reduction is of what several stages hold."""
    return any(axis.startswith(SHARED) for axis in ((axes,) if isinstance(axes, str) else axes))


def shares_between_stages(plan: Plan) -> bool:
    return any(over_stages(layout.state.partial) for layout in plan.layouts.values() if layout.trainable)


def halve_crossing_gradients(trained: Trained) -> None:
    """Gradients that come back from the next stage count half."""

    def halved(payload: Payload, action: Action, tensors: Tensors) -> Tensors:
        del action
        return tuple(tensor / 2 for tensor in tensors) if payload == "gradients" else tensors

    _change_what_comes(trained, halved)


def repeat_a_microbatch(trained: Trained) -> None:
    """A stage gets the activations of microbatch 0 for microbatch 1, too."""
    first: dict[int, Tensors] = {}

    def repeated(payload: Payload, action: Action, tensors: Tensors) -> Tensors:
        if payload != "activations" or action.microbatch > 1:
            return tensors
        if action.microbatch == 0:
            first[action.stage] = tuple(tensor.detach().clone() for tensor in tensors)
            return tensors
        pairs = zip(tensors, first[action.stage], strict=True)
        return tuple(earlier.clone().requires_grad_(tensor.requires_grad) for tensor, earlier in pairs)

    _change_what_comes(trained, repeated)


def _change_what_comes(trained: Trained, change: Received) -> None:
    links = trained._engine.runner._links
    take = links.take

    def changed(payload: Payload, action: Action) -> Tensors:
        return change(payload, action, take(payload, action))

    vars(links)["take"] = changed
