"""Twins of the references: implementations of every op under another provider, so that a model uses ops where no kernel runs.

Each is one node of autograd's graph, as a kernel is: its backward pass computes the reference again and differentiates that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from colossal_core.dataflow import tensors_in, with_tensors
from colossal_core.model_ops.planning import MODEL_OPS
from colossal_core.ops import OpImplementation
from colossal_core.ops.reference import reference_ops

PROVIDER = "twin"


def twins() -> Sequence[OpImplementation]:
    """A twin of every op that a model's own code may use, of higher priority than the reference."""
    found = {one.op: one.function for one in reference_ops()}
    return [OpImplementation(op, PROVIDER, twin_of(found[op]), priority=1) for op in MODEL_OPS]


def twins_under_compile() -> Sequence[OpImplementation]:
    """Twins that are used inside compiled blocks too: the references themselves, which torch.compile can trace."""
    found = {one.op: one.function for one in reference_ops()}
    return [OpImplementation(op, PROVIDER, found[op], priority=1, under_compile=True) for op in MODEL_OPS]


def twin_of(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one node in autograd's graph that computes the same, and the same gradients."""

    def twin(*args: Any, **kwargs: Any) -> Any:
        given = (args, kwargs)
        several: list[bool] = []
        made = _Twin.apply(reference, given, several, *tensors_in(given))  # type: ignore[no-untyped-call]
        return made if several else made[0]

    return twin


class _Twin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, reference: Callable[..., Any], given: Any, several: list[bool], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        args, kwargs = with_tensors(given, iter(tensors))
        made = reference(*args, **kwargs)
        if not isinstance(made, Tensor):
            several.append(True)
        ctx.reference, ctx.given = reference, given
        ctx.save_for_backward(*tensors)
        outputs = tuple(one.clone() for one in tensors_in(made))
        ctx.mark_non_differentiable(*(one for one in outputs if not one.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        leaves = [one.detach().requires_grad_(one.is_floating_point()) for one in ctx.saved_tensors]
        args, kwargs = with_tensors(ctx.given, iter(leaves))
        with torch.enable_grad():
            outputs = list(tensors_in(ctx.reference(*args, **kwargs)))
        pairs = [(one, grad) for one, grad in zip(outputs, gradients, strict=True) if one.requires_grad]
        wanted = [one for one in leaves if one.requires_grad]
        found = iter(
            torch.autograd.grad([one for one, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True)
        )
        return (None, None, None, *(next(found) if one.requires_grad else None for one in leaves))
