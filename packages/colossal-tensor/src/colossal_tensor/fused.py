"""Sequence parallelism with its communication hidden: the products that stand at an entry or an exit, made by operators that gather and
multiply, or multiply and scatter, piece by piece (`matmul.py`).

A linear layer that reads an entry's argument gets its result when the argument enters: the module's own forward then finds it. So the
model's code runs as it is, and reads the shape of the whole sequence where it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from colossal_tensor.hooks import ArgumentHook
from colossal_tensor.matmul import SequenceMatmul
from colossal_tensor.sequence import sequence_dim


def is_product(module: nn.Module) -> bool:
    """Whether a module is a plain product with its weight: nothing else is in its forward."""
    return type(module).forward is nn.Linear.forward or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """transformers' Conv1D keeps [in, out]."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d)


@dataclass(frozen=True)
class FusedEntry:
    """The part of a sequence enters a group: it is gathered, and multiplied with the weights of `columns`, which read nothing else."""

    matmul: SequenceMatmul
    argument: str
    columns: tuple[nn.Module, ...]

    def install(self, module: nn.Module) -> None:
        for place, column in enumerate(self.columns):
            vars(column)["place"] = place
            column.forward = MethodType(_found_or_made, column)
        ArgumentHook((self.argument,), self._entered).install(module)

    def _entered(self, part: torch.Tensor) -> torch.Tensor:
        """The whole sequence, which carries the products: on the tensor, because torch.compile lets a recomputed block write on nothing
        that was there before it.
        """
        weights, biases = _weights(self.columns), [column.bias for column in self.columns]
        whole, results = self.matmul.gather_columns(
            part,
            weights,
            biases,  # type: ignore[arg-type]
            dim=sequence_dim(part),
            transposed=is_transposed(self.columns[0]),
        )
        whole = whole.view_as(whole)  # Dynamo sets attributes on what an operator returns alone
        whole.products = dict(enumerate(results))  # type: ignore[attr-defined]
        return whole


def _weights(columns: Sequence[nn.Module]) -> list[torch.Tensor]:
    return [column.weight for column in columns]  # type: ignore[misc]


def _found_or_made(self: Any, x: torch.Tensor) -> torch.Tensor:
    """A column's forward: what its entry has made of the same tensor, or the product."""
    products: dict[int, torch.Tensor] | None = getattr(x, "products", None)
    if products is not None and self.place in products:
        return products.pop(self.place)
    return F.linear(x, self.weight.t() if is_transposed(self) else self.weight, self.bias)


@dataclass(frozen=True)
class FusedExit:
    """A row's product leaves a group: it is made and scattered along the sequence; its bias is added to each rank's part."""

    matmul: SequenceMatmul

    def install(self, module: nn.Module) -> None:
        vars(module)["exit"] = self
        module.forward = MethodType(_left, module)

    def left(
        self, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, transposed: bool
    ) -> torch.Tensor:
        part = self.matmul.row_scatter(h, weight, dim=sequence_dim(h), transposed=transposed)
        return part if bias is None else part + bias


def _left(self: Any, h: torch.Tensor) -> torch.Tensor:
    """A row's forward. The same function for every row: what torch.compile made of one block serves the next."""
    exit_: FusedExit = self.exit
    return exit_.left(h, self.weight, self.bias, transposed=is_transposed(self))
