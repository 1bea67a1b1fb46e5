"""Sums over whole parameters from the shards of all ranks: one all-reduce for all parameters together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.optimizers import OptimizerContext


def cut_axes(master: torch.Tensor, context: OptimizerContext) -> tuple[str, ...]:
    """The axes of more than one rank along which a parameter's state is cut: its elements lie once on each group over them."""
    axes = context.shard(master).layout.state.cut_axes
    return tuple(axis for axis in axes if context.collectives.mesh.size(axis) > 1)


def copied_axes(master: torch.Tensor, context: OptimizerContext) -> tuple[str, ...]:
    """The axes of more than one rank along which a parameter's state is copied."""
    mesh = context.collectives.mesh
    return tuple(axis for axis in context.shard(master).layout.state.replicated if mesh.size(axis) > 1)


class ShardSums:
    """Adds up vectors of numbers, one for each master, over the ranks that hold its elements.

    Copies (along replicated axes) each add up the same, and nothing of theirs is counted twice.
    """

    def __init__(self, masters: Sequence[nn.Parameter], lengths: Sequence[int], context: OptimizerContext) -> None:
        """lengths: how many numbers each master has."""
        self._context = context
        by_axes: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for index, master in enumerate(masters):
            by_axes[cut_axes(master, context)].append(index)
        self._order = list(by_axes.items())
        self._places: dict[int, tuple[int, int, int]] = {}
        self._totals: list[int] = []
        for group, (_, members) in enumerate(self._order):
            start = 0
            for index in members:
                self._places[index] = (group, start, start + lengths[index])
                start += lengths[index]
            self._totals.append(start)

    def zeros(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """One flat vector for each set of axes. `view` says which part of it is a master's."""
        return [torch.zeros(total, dtype=dtype, device=self._context.device) for total in self._totals]

    def view(self, vectors: Sequence[torch.Tensor], index: int) -> torch.Tensor:
        """The numbers of the master with this index."""
        group, start, stop = self._places[index]
        return vectors[group][start:stop]

    def reduce(self, vectors: Sequence[torch.Tensor], tag: str) -> None:
        """Communication: for each set of axes that cuts some parameter, one all-reduce over it of the vector's bytes."""
        handles = [
            self._context.collectives.start_all_reduce(vector, axes, use="reduce", tag=tag)
            for vector, (axes, _) in zip(vectors, self._order, strict=True)
            if axes and vector.numel()
        ]
        for handle in handles:
            handle.wait()


class SquareNorms:
    """Squares of L2 norms of whole parameters, `count` quantities for each master at once."""

    def __init__(self, masters: Sequence[nn.Parameter], count: int, context: OptimizerContext) -> None:
        self._sums = ShardSums(masters, [count] * len(masters), context)
        self._num_masters, self._count = len(masters), count

    def of(self, squares: Sequence[Sequence[torch.Tensor]], tag: str) -> list[torch.Tensor]:
        """squares: `count` lists, each with this rank's 0-d sum of squares for each master. Returns, for each quantity, its squared norms
        as one vector [number of masters]. Communication: one all-reduce of `count` numbers a parameter."""
        assert len(squares) == self._count, "one list for each quantity"
        vectors = self._sums.zeros(squares[0][0].dtype)
        targets = [self._sums.view(vectors, index)[k] for k in range(self._count) for index in range(self._num_masters)]
        torch._foreach_copy_(targets, [square for quantity in squares for square in quantity])
        self._sums.reduce(vectors, tag)
        found = torch.stack(targets).view(self._count, self._num_masters)
        return list(found.unbind())


def local_squares(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """0-d sums of squares of each tensor: 0 for an empty one."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return [tensor.new_zeros(()) for tensor in tensors]
    norms = torch._foreach_norm(filled, 2)
    squares = iter(torch._foreach_mul(norms, norms))
    return [next(squares) if tensor.numel() else tensor.new_zeros(()) for tensor in tensors]


def gradients_of(masters: Sequence[torch.Tensor], context: OptimizerContext) -> list[torch.Tensor]:
    """The raw gradient of every master. All are there: an optimizer that communicates needs them on all ranks or on none."""
    found = [context.gradient(master) for master in masters]
    gradients = [gradient for gradient in found if gradient is not None]
    assert len(gradients) == len(found), "a step before the first backward pass"
    return gradients
