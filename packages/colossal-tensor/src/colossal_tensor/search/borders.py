"""The border of a site: where the stream enters it and where its sum leaves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from colossal_tensor.group import Entry, Exit
from colossal_tensor.search.sites import Member, Names, Site
from colossal_tensor.search.trace import MIXED, Trace


@dataclass(frozen=True)
class Setting:
    """What candidates are made from. numbers: integers of the small model's modules, by (module, attribute). shapes: of its parameters."""

    model: nn.Module
    trace: Trace
    names: Names
    blocks: tuple[str, ...]
    numbers: Mapping[tuple[str, str], int]
    shapes: Mapping[str, tuple[int, ...]]


class Borders:
    """Ways in and out of a site. main: the one that is looked at; sites: all that look alike."""

    def __init__(self, main: Site, sites: Sequence[Site], setting: Setting) -> None:
        self._main, self.sites, self._setting = main, tuple(sites), setting
        self._pattern = setting.names.pattern

    def entries(self) -> Iterator[tuple[Entry, ...]]:
        """Where the stream enters, likeliest first: the module that holds columns and rows, with all that it is given of the stream or the
        first of it alone (a residual may be given too); those around it; the columns themselves.
        """
        owners = [owner_of(column) for column in self._main.columns]
        rows = [owner_of(row) for row in self._main.rows]
        levels = list(dict.fromkeys([*self._levels([*owners, *rows]), *self._levels(owners)]))
        found: list[tuple[tuple[str, tuple[str, ...]], ...]] = [
            ((level, given),) for level in levels for given in self._ways_in(level)
        ]
        found.append(tuple((owner, self._arguments(owner)) for owner in dict.fromkeys(owners)))
        for places in sorted(dict.fromkeys(found), key=self._is_in_list):
            if all(arguments for _, arguments in places):
                yield tuple(
                    Entry(self._pattern(module), arguments, self._readers(module, arguments[0]))
                    for module, arguments in places
                )

    def _readers(self, module: str, key: str) -> tuple[str, ...]:
        """The columns that read an argument of a module as it is."""
        given = self._setting.trace.arguments
        tensors = {
            (argument.storage, argument.shape) for argument in given if (argument.module, argument.key) == (module, key)
        }
        owners = dict.fromkeys(map(owner_of, self._main.columns))
        reading = {
            argument.module
            for argument in given
            if argument.key == "0" and (argument.storage, argument.shape) in tensors
        }
        inside = (name for name in reading if name.startswith(f"{module}."))
        if any(isinstance(self._setting.model.get_submodule(name), nn.Dropout) for name in inside):
            return ()  # a dropout gives on the very tensor here, where nothing is dropped
        return tuple(self._pattern(owner) for owner in owners if owner in reading)

    def _ways_in(self, module: str) -> Iterator[tuple[str, ...]]:
        arguments = self._arguments(module)
        yield arguments
        if len(arguments) > 1:
            yield arguments[:1]

    def _is_in_list(self, places: Sequence[tuple[str, object]]) -> bool:
        """Whether a place stands once for each element of a list inside a block: each would communicate by itself."""
        pattern = self._pattern(places[0][0])
        block = max((self._pattern(name) for name in self._setting.blocks if places[0][0].startswith(name)), default="")
        return pattern.count("*") > block.count("*")

    def _arguments(self, module: str) -> tuple[str, ...]:
        cut = {member.name for site in self.sites for member in (*site.columns, *site.rows)}
        found: dict[str, None] = {}
        for argument in self._setting.trace.arguments:
            if argument.module == module and argument.sources - cut - {MIXED}:
                found[argument.key] = None
        return tuple(found)

    def _levels(self, owners: Sequence[str]) -> Iterator[str]:
        """Modules that hold all the owners, innermost first, inside the block, and that are called."""
        level = common(owners)
        while level and level not in self._setting.blocks:
            if level in self._setting.trace.calls:
                yield level
            level = level.rpartition(".")[0]

    def exits(self) -> Iterator[tuple[Exit, ...]]:
        rows = self._main.rows
        owners = list(dict.fromkeys(owner_of(row) for row in rows))
        biases = tuple(self._pattern(bias.parameter) for row in rows for bias in row.biases)
        found: list[tuple[tuple[str, int], ...]] = []
        if all(owner in self._setting.trace.calls for owner in owners):
            found.append(tuple((owner, 0) for owner in owners))
        labels = frozenset(row.name for row in rows)
        for level in self._levels(owners):
            output = self._output(level, labels)
            if output is not None and ((level, output),) not in found:
                found.append(((level, output),))
        for places in sorted(found, key=self._is_in_list):
            yield tuple(
                Exit(self._pattern(module), output, biases if index == 0 else ())
                for index, (module, output) in enumerate(places)
            )

    def _output(self, module: str, rows: frozenset[str]) -> int | None:
        return next(
            (index for name, index, _, sources in self._setting.trace.outputs if name == module and sources & rows),
            None,
        )

    def dropouts(self) -> tuple[tuple[str, int], ...]:
        cut = {member.name for site in self.sites for member in site.columns}
        found = {}
        for argument in self._setting.trace.arguments:
            dropout = isinstance(self._setting.model.get_submodule(argument.module), nn.Dropout)
            if dropout and argument.sources & cut:
                found[self._pattern(argument.module)] = 1 if len(argument.shape) == 4 else len(argument.shape) - 1
        return tuple(found.items())


def owner_of(member: Member) -> str:
    """The module that computes a product: an adapted layer as a whole."""
    return member.name.rpartition(".")[0].removesuffix(".base_layer")


def common(names: Sequence[str]) -> str:
    """The innermost module that holds all of these, or is all of these."""
    parts = [name.split(".") for name in names]
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return ".".join(column[0] for column in shared)
