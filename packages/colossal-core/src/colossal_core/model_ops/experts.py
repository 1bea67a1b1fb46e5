"""Layers of gated experts in a model: modules of two stacks of matrices, called with (x, chosen, weights), that compute `experts`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colossal_core.dataflow import meta_copy
from colossal_core.model_ops.proving import drawing, drawn, is_same, with_random_values
from colossal_core.ops.experts import experts

_ROWS, _CHOICES, _WIDTH, _HIDDEN = 7, 2, 8, 6


@dataclass(frozen=True)
class Experts:
    """The names of a module's parameters: gate_up [E, 2F, D], down [E, D, F]."""

    gate_up: str
    down: str

    def bound(
        self, function: Callable[..., Tensor], module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor
    ) -> Tensor:
        return function(x, getattr(module, self.gate_up), getattr(module, self.down), chosen, weights)


def guesses(module: nn.Module) -> Iterator[Experts]:
    """What a module may be by the shapes of its parameters: exactly two, of three dimensions."""
    stacks = dict(module.named_parameters())
    if len(stacks) != 2 or any("." in name or stack.dim() != 3 for name, stack in stacks.items()):
        return
    for gate_up, down in itertools.permutations(stacks):
        (count, double, width), other = stacks[gate_up].shape, stacks[down].shape
        if double % 2 == 0 and tuple(other) == (count, width, double // 2):
            yield Experts(gate_up, down)


def find_experts(module: nn.Module) -> Experts | None:
    """What a candidate computes, proven in values and gradients on its own matrices in small; None where it is not the op."""
    found = list(guesses(module))
    if not found:
        return None
    with drawing():
        try:
            copied = with_random_values(_small(module, found[0]))
        except Exception:  # whatever a stranger's attributes raise when they are copied
            return None
        stacks = dict(copied.named_parameters())
        count, _, width = stacks[found[0].gate_up].shape
        chosen = torch.stack([torch.randperm(count)[: min(_CHOICES, count)] for _ in range(_ROWS)])
        rows = [
            drawn(_ROWS, width, scale=scale) for scale in (1.0, 1e3)
        ]  # a limit (MiniMax, Step) shows on large ones alone
        weights = drawn(*chosen.shape)
        for one in found:
            if all(
                is_same(
                    lambda x, weights, *_: copied(x, chosen, weights),
                    lambda x, weights, *_, one=one: one.bound(experts, copied, x, chosen, weights),
                    [x, weights, *stacks.values()],
                )
                for x in rows
            ):
                return one
    return None


def _small(module: nn.Module, guess: Experts) -> nn.Module:
    """A copy of the module on meta whose matrices have few rows and columns: those of a real model may be gigabytes. Its experts stay as
    many as they are.
    """
    copied = meta_copy(module)
    count = len(copied.get_parameter(guess.gate_up))
    for name, shape in ((guess.gate_up, (count, 2 * _HIDDEN, _WIDTH)), (guess.down, (count, _WIDTH, _HIDDEN))):
        copied.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
    return copied


def by_experts(found: Experts, function: Callable[..., Tensor], original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward method of a module that computes `found`, by an implementation of the op. A call that was not proven goes to the module's
    own forward.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 3 and not kwargs:
            x, chosen, weights = args
            stack = getattr(self, found.gate_up)
            if x.dim() == 2 and chosen.dim() == 2 and weights.shape == chosen.shape and x.dtype == stack.dtype:
                return found.bound(function, self, x, chosen, weights)
        return original(self, *args, **kwargs)

    return forward
