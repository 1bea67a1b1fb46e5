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

from colossal_tensor.matmul import SequenceMatmul
from colossal_tensor.sequence import sequence_dim, with_arguments


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
        for column in self.columns:
            vars(column)["arrived"] = None
            column.forward = MethodType(_found_or_made, column)
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        return with_arguments(args, kwargs, (self.argument,), self._entered)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Lets go of what no column has asked for: it holds a whole sequence."""
        del module, args, output
        for column in self.columns:
            column.arrived = None  # type: ignore[assignment]

    def _entered(self, part: torch.Tensor) -> torch.Tensor:
        weights, biases = _weights(self.columns), [column.bias for column in self.columns]
        whole, results = self.matmul.gather_columns(
            part,
            weights,
            biases,  # type: ignore[arg-type]
            dim=sequence_dim(part),
            transposed=is_transposed(self.columns[0]),
        )
        for column, result in zip(self.columns, results, strict=True):
            column.arrived = (whole, result)  # type: ignore[assignment]
        return whole


def _weights(columns: Sequence[nn.Module]) -> list[torch.Tensor]:
    return [column.weight for column in columns]  # type: ignore[misc]


def _found_or_made(self: Any, x: torch.Tensor) -> torch.Tensor:
    """A column's forward: what its entry has made of the same tensor, or the product."""
    arrived = self.arrived
    if arrived is not None and arrived[0] is x:
        self.arrived = None
        result: torch.Tensor = arrived[1]
        return result
    return F.linear(x, self.weight.t() if is_transposed(self) else self.weight, self.bias)


@dataclass(frozen=True)
class FusedExit:
    """A row's product leaves a group: it is made and scattered along the sequence; its bias is added to each rank's part."""

    matmul: SequenceMatmul

    def install(self, module: nn.Module) -> None:
        module.forward = MethodType(self._left, module)

    def _left(self, module: Any, h: torch.Tensor) -> torch.Tensor:
        transposed = is_transposed(module)
        part = self.matmul.row_scatter(h, module.weight, dim=sequence_dim(h), transposed=transposed)
        return part if module.bias is None else part + module.bias
