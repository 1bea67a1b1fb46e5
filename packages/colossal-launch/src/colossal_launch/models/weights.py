"""Where the values of parameters come from, and in which portions: the one interface through which a sharded model is filled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

REST = ""
"""The unit of everything outside the blocks."""


class WeightSource(Protocol):
    """Full values by full name, unit by unit, so that no more than one unit's values exist at once."""

    def values(self, unit: str, blocks: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The values of one unit: a block by its name, or `REST`. blocks: the names of all blocks.

        Parameters (float32 where they float; a tied one once, under its full name), and those buffers that the module on the meta device
        has no values for. The same on every rank and for every choice of blocks. No communication.
        """


@dataclass(frozen=True)
class WholeModel:
    """The values of a model that is built whole, on the CPU, on first use: for what cannot be made unit by unit.

    needed_buffers: names of buffers that have to be given too. held: the built model, once it is.
    """

    build: Callable[[], nn.Module]
    needed_buffers: tuple[str, ...]
    held: list[nn.Module]

    def values(self, unit: str, blocks: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        if not self.held:
            self.held.append(self.build())
        model = self.held[0]
        for name, parameter in model.named_parameters():
            if unit_of(name, blocks) == unit:
                yield name, as_value(parameter)
        buffers = dict(model.named_buffers())
        for name in self.needed_buffers:
            if unit_of(name, blocks) == unit:
                yield name, as_value(buffers[name])


def unit_of(name: str, blocks: Collection[str]) -> str:
    """The unit of a parameter, buffer or module: the block that it is, or is inside of, else `REST`."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        prefix = ".".join(parts[:count])
        if prefix in blocks:
            return prefix
    return REST


def as_value(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a value: detached, float32 where it floats."""
    value = tensor.detach()
    return value.float() if value.is_floating_point() else value


def all_values(
    source: WeightSource, blocks: Collection[str], held: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The values of the whole model: the rest first, then block by block. held: the blocks that are wanted; None: all."""
    for unit in (REST, *(block for block in blocks if held is None or block in held)):
        yield from source.values(unit, blocks)


def alias_table(model: nn.Module) -> Mapping[str, str]:
    """Full name by alias, for every tied parameter; full names themselves are left out."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        full_name = first.setdefault(id(parameter), name)
        if full_name != name:
            found[name] = full_name
    return found
