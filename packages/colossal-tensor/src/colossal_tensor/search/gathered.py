"""Products without a partner: cut by output features, and the results gathered. Always the same numbers, at the price of a message each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from colossal_tensor.group import Entry, Exit, Group, ParameterCut, Scaled, Units
from colossal_tensor.search.sites import column_of

if TYPE_CHECKING:
    from colossal_tensor.search.laboratory import Laboratory

_NARROWEST = 4
"""A product with less than 1/4 as many outputs as inputs (a router, a gate) is not worth a message."""


def gathered_groups(lab: Laboratory, left: Iterable[str]) -> Iterator[Group]:
    """A group for each pattern among the weights that are left. Each product is a module of its own."""
    setting, seen = lab.setting, set()
    for weight in left:
        owner = weight.rpartition(".")[0].removesuffix(".base_layer")
        pattern = setting.names.pattern(owner)
        shape = setting.shapes[weight]
        alone = sum(other.startswith(f"{owner}.") for other in lab.weights) == 1
        if pattern in seen or len(shape) != 2 or not alone or owner not in setting.trace.calls:
            continue
        column = column_of(setting.trace, setting.shapes, weight)
        if column.size * _NARROWEST < max(shape):
            continue
        arguments = {
            arg.key: None for arg in setting.trace.arguments if arg.module == owner and arg.floating and arg.sources
        }
        if not arguments:
            continue
        seen.add(pattern)
        sizes = {
            Scaled(pattern, read.attribute): None
            for read in setting.trace.reads
            if read.module == owner and read.value == column.size and read.value not in set(shape) - {column.size}
        }
        yield Group(
            name=pattern,
            cuts=tuple(
                ParameterCut(setting.names.pattern(factor.parameter), factor.dim, optional=factor in column.biases)
                for factor in (*column.factors, *column.biases)
            ),
            entries=(Entry(pattern, tuple(arguments)),),
            exits=(Exit(pattern, gathers=True),),
            units=Units("features"),
            scaled=tuple(sizes),
        )
