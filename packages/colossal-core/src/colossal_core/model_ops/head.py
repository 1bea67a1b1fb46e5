"""The head of a language model and its loss as one op, so that the logits never exist: `linear_cross_entropy`.

While core's loss is made of a forward pass, the head returns what it was given, and the loss multiplies. Whoever else calls the model gets
its logits, and so does an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colossal_core.model_ops.remaking import put

if TYPE_CHECKING:
    from colossal_core.strategy import ApplyContext


def is_plain_head(model: nn.Module, name: str) -> bool:
    """Whether a head is a product with its weight and nothing else. One with hooks has somebody who wants its output, and so has one inside
    of a module (the model) with hooks behind its forward, or with a forward that was put on it.
    """
    head = model.get_submodule(name)
    hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    if any(
        one._forward_hooks or one._backward_hooks or one._backward_pre_hooks or "forward" in vars(one) for one in around
    ):
        return False
    return (
        type(head) is nn.Linear
        and dict(head.named_parameters()).keys() == {"weight"}
        and not hooks
        and "forward" not in vars(head)
    )


class HeadLoss:
    """`colossal_core.strategy.CrossEntropy` by the op, of a head that is on this rank and whole."""

    def __init__(self, function: Callable[..., Tensor], context: ApplyContext) -> None:
        self._function = function
        self._context = context
        self._reading = False
        self._handed: tuple[Tensor, Tensor] | None = None

    def install(self, head: nn.Module) -> None:
        """Gives the head a forward that hands over its input while a loss reads the model."""

        def forward(module: nn.Module, hidden: Tensor) -> Tensor:
            weight = module.get_parameter("weight")
            if self._reading and torch.is_grad_enabled():
                self._handed = (hidden, weight)
                return hidden
            return F.linear(hidden, weight)

        put(head, "forward", forward)

    @contextmanager
    def reading(self) -> Iterator[None]:
        self._reading, self._handed = True, None
        try:
            yield
        finally:
            self._reading = False

    def __call__(self, logits: Tensor, labels: Tensor, /, *, overwrite: bool) -> tuple[Tensor, Tensor]:
        handed, self._handed = self._handed, None
        if handed is None:
            return self._plain(logits, labels, overwrite=overwrite)
        hidden, weight = handed
        assert logits is hidden, "the plan has seen that what the head returns is what the model does"
        return self._function(hidden, weight, labels), (labels != IGNORED_LABEL).sum()

    def _plain(self, logits: Tensor, labels: Tensor, *, overwrite: bool) -> tuple[Tensor, Tensor]:
        total, count = self._context.ops["cross_entropy"](logits, labels, overwrite=overwrite)
        return total, count


IGNORED_LABEL = -100
"""transformers' label of a position where nothing is to be predicted."""
