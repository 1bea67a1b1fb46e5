"""What a site could be cut like: groups in the order of their likelihood, for the proof to try.

The trace says which dimensions are cut. What it cannot say is tried: what lies along a dimension one after another, which integers shrink,
where the stream enters and where the sum leaves, and which module says how many heads there are.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from colossal_tensor.group import Entry, Exit, Group, Packing, ParameterCut, Scaled, Units
from colossal_tensor.search.borders import Borders, Setting, common, owner_of
from colossal_tensor.search.sites import Factor, Member, Site

MOST_WAYS = 96
"""How many ways of computing the forward pass are tried for one site."""
_MOST_SUBSETS = 24

_HEADS = re.compile(r"(^|_|\.)(n|num|nb)?_?\w*heads?$")
_NO_COUNT = re.compile(r"dim|size|width|group|per_|mamba|index|linear")
_SHARED = re.compile(r"kv|key_value")


@dataclass(frozen=True)
class Way:
    """One way of computing a site's forward pass on a part, and the entries to try with it, each of which makes a group."""

    groups: tuple[Group, ...]


@dataclass(frozen=True)
class _Heads:
    """Where the numbers of heads are read, with their values here."""

    units: Units
    heads: int
    shared: int


class Kind:
    """All sites that have a product in common by its pattern; where they differ is optional. packings: those that are known, by pattern
    of a product.
    """

    def __init__(self, sites: Sequence[Site], setting: Setting, packings: Mapping[str, Packing] | None = None) -> None:
        self.sites, self._setting, self._known = tuple(sites), setting, dict(packings or {})
        self._pattern = setting.names.pattern
        self._main = max(sites, key=lambda site: (len(site.columns), len(site.others)))
        self._borders = Borders(self._main, self.sites, setting)
        everywhere = [self._patterns(site) for site in sites]
        self._required = frozenset.intersection(*everywhere)

    @property
    def columns(self) -> frozenset[str]:
        """Names of the weights of all columns, in every place."""
        return frozenset(column.name for site in self.sites for column in site.columns)

    @property
    def rows(self) -> frozenset[str]:
        return frozenset(row.name for site in self.sites for row in site.rows)

    @property
    def name(self) -> str:
        return self._pattern(self._container())

    def _patterns(self, site: Site) -> frozenset[str]:
        return frozenset(
            self._pattern(factor.parameter) for member in (*site.columns, *site.rows) for factor in member.factors
        )

    def _container(self) -> str:
        return common([owner_of(member) for member in (*self._main.columns, *self._main.rows)])

    def ways(self) -> Iterator[Way]:
        """Every way to try, likeliest first."""
        options: list[tuple[_Heads | None, Sequence[Sequence[ParameterCut]], Sequence[tuple[Scaled, ...]]]] = [
            (heads, list(self._cuts(heads)), list(self._scaled(heads))) for heads in self._heads()
        ]
        exits = list(self._borders.exits())
        entries = list(self._borders.entries())
        choices = [
            (index + cut_index + exit_index + scaled_index, heads, cuts, exit_, scaled, sliced)
            for index, (heads, all_cuts, all_scaled) in enumerate(options)
            for cut_index, cuts in enumerate(all_cuts)
            for exit_index, exit_ in enumerate(exits)
            for scaled_index, scaled in enumerate(all_scaled)
            for sliced in self._sliced(heads)
        ]
        choices.sort(key=lambda choice: choice[0])
        for _, heads, cuts, exit_, scaled, sliced in choices[:MOST_WAYS]:
            units = heads.units if heads is not None else Units("features")
            yield Way(
                tuple(
                    Group(
                        self._spanning(entry, exit_),
                        tuple(cuts),
                        entry,
                        exit_,
                        units,
                        scaled,
                        sliced,
                        self._borders.dropouts(),
                    )
                    for entry in entries
                )
            )

    def _spanning(self, entries: Sequence[Entry], exits: Sequence[Exit]) -> str:
        """The innermost module that holds everything, entries and exits too."""
        return common([self.name, *(entry.module for entry in entries), *(exit_.module for exit_ in exits)])

    # -- units -------------------------------------------------------------------------------------------------------------------

    def _heads(self) -> list[_Heads | None]:
        if not self._main.by_head:
            return [None]
        width = self._main.rows[0].size
        found: list[_Heads | None] = []
        counts = self._counts()
        plain = [(where, count) for where, count in counts if not _SHARED.search(where[1])]
        shared = [(where, count) for where, count in counts if _SHARED.search(where[1])]
        for where, count in plain:
            if count < 2 or width % count:
                continue
            pairs = [(other, less) for other, less in shared if count % less == 0 and less <= count]
            own = [pair for pair in pairs if pair[0][0] == where[0]] or pairs
            for other, less in own[:1]:
                found.append(_Heads(Units("heads", self._where(where), self._where(other)), count, less))
            found.append(_Heads(Units("heads", self._where(where)), count, count))
        for where, count in shared:
            if count > 1 and width % count == 0:
                found.append(_Heads(Units("heads", self._where(where)), count, count))
        return list(dict.fromkeys(found))[:6]

    def _where(self, where: tuple[str, str]) -> tuple[str, str]:
        return self._pattern(where[0]), where[1]

    def _counts(self) -> list[tuple[tuple[str, str], int]]:
        """Numbers of heads that modules around the site say of themselves: inner modules first, their own before their config's."""
        around = [self._container()]
        while around[-1]:
            around.append(around[-1].rpartition(".")[0])
        found = [
            ((module, name), value)
            for module in around
            for (owner, name), value in sorted(self._setting.numbers.items(), key=lambda item: "config." in item[0][1])
            if owner == module and _HEADS.search(name) and not _NO_COUNT.search(name) and value > 0
        ]
        return list({(name, value): ((module, name), value) for (module, name), value in reversed(found)}.values())[
            ::-1
        ]

    # -- cuts --------------------------------------------------------------------------------------------------------------------

    def _cuts(self, heads: _Heads | None) -> Iterator[list[ParameterCut]]:
        width = self._main.rows[0].size
        members = self._all_members()
        choices = [
            [(packing, shared) for packing, shared in self._packings(member, as_row, width, heads)]
            for member, as_row in members
        ]
        others = self._others(heads)
        for chosen in itertools.islice(itertools.product(*choices), 12):
            cuts = []
            for (member, _), (packing, shared) in zip(members, chosen, strict=True):
                cuts += [self._cut(factor, packing, shared) for factor in (*member.factors, *self._added(member))]
            for extra in [others, []] if others else [[]]:
                yield list(dict.fromkeys([*cuts, *extra]))

    def _all_members(self) -> list[tuple[Member, bool]]:
        """Columns and rows of every site, one of each pattern."""
        found: dict[str, tuple[Member, bool]] = {}
        for site in (self._main, *self.sites):
            for member in site.columns:
                found.setdefault(self._pattern(member.name), (member, False))
            for member in site.rows:
                found.setdefault(self._pattern(member.name), (member, True))
        return list(found.values())

    def _added(self, member: Member) -> tuple[Factor, ...]:
        return member.biases if any(member is column for site in self.sites for column in site.columns) else ()

    def _cut(self, factor: Factor, packing: Packing, shared: bool) -> ParameterCut:
        pattern = self._pattern(factor.parameter)
        return ParameterCut(pattern, factor.dim, packing, shared, optional=pattern not in self._required)

    def _packings(
        self, member: Member, as_row: bool, width: int, heads: _Heads | None
    ) -> Iterator[tuple[Packing, bool]]:
        size = member.size
        known = self._known.get(self._pattern(member.name))
        if known is not None:
            yield known, False
            return
        if as_row:
            yield "whole", False
            return
        if heads is None:
            if size % 3 == 0 and size == 3 * width:
                yield "three", False
            if size % 2 == 0 and size == 2 * width:
                yield "two", False
            yield "whole", False
            return
        head = width // heads.heads
        alone = len(self._main.columns) == 1
        if alone and size == width + 2 * heads.shared * head and heads.shared < heads.heads:
            yield "qkv", False
        if alone and size == 3 * width:
            yield "three", False
        if size == 2 * width or (heads.shared < heads.heads and size == 2 * heads.shared * head):
            yield "whole", heads.shared < heads.heads and size < width
            yield "two", heads.shared < heads.heads and size <= width
            return
        if heads.shared < heads.heads and size % heads.shared == 0 and size < width:
            yield "whole", True
        yield "whole", False

    def _others(self, heads: _Heads | None) -> list[ParameterCut]:
        """Parameters inside that belong to no product, cut where a dimension has as many entries as a column, or as there are heads."""
        sizes = {column.size: False for column in self._main.columns}
        sizes[self._main.rows[0].size] = False
        if heads is not None:
            head = self._main.rows[0].size // heads.heads
            sizes.update({heads.shared * head: True, heads.shared: True} if heads.shared < heads.heads else {})
            sizes.update({heads.heads: False, heads.heads * head: False})
        found = {}
        for site in self.sites:
            for name, shape in site.others:
                dim = next((dim for dim, size in enumerate(shape) if size in sizes and size > 1), None)
                if dim is not None:
                    pattern = self._pattern(name)
                    found[pattern] = ParameterCut(pattern, dim, "whole", sizes[shape[dim]], optional=True)
        return list(found.values())

    # -- integers ----------------------------------------------------------------------------------------------------------------

    def _scaled(self, heads: _Heads | None) -> Iterator[tuple[Scaled, ...]]:
        """Subsets of the integers inside that are the size of something that is cut: all of them first, then none, then others."""
        sizes = {
            size for member, _ in self._all_members() for size in (member.size, member.size // 2, member.size // 3)
        }
        if heads is not None:
            sizes |= {heads.heads, heads.shared} - {1}
            sizes |= {heads.shared * self._main.rows[0].size // heads.heads}
        ratio = heads.heads // heads.shared if heads is not None else 1
        container, found = self._container(), dict[Scaled, None]()
        for read in self._setting.trace.reads:
            if not (read.module == container or read.module.startswith(container + ".")):
                continue
            if ratio > 1 and read.value == ratio and "group" in read.attribute:
                found[Scaled(self._pattern(read.module), read.attribute, ratio=True)] = None
            elif read.value in sizes and not self._is_plain(read.module):
                shared = heads is not None and heads.shared < heads.heads and bool(_SHARED.search(read.attribute))
                found[Scaled(self._pattern(read.module), read.attribute, shared)] = None
        always = tuple(scaled for scaled in found if scaled.ratio)
        rest = [scaled for scaled in found if not scaled.ratio]
        subsets = itertools.chain.from_iterable(
            itertools.combinations(rest, number) for number in _from_the_ends(len(rest))
        )
        for subset in itertools.islice(subsets, _MOST_SUBSETS):
            yield (*always, *subset)

    def _is_plain(self, name: str) -> bool:
        """A module that reads its sizes only to describe itself."""
        return isinstance(self._setting.model.get_submodule(name), nn.Linear)

    def _sliced(self, heads: _Heads | None) -> Iterator[tuple[tuple[str, str, int], ...]]:
        """Arguments that belong to no product and hold something for every head."""
        yield ()
        if heads is None:
            return
        container, found = self._container(), dict[tuple[str, str, int], None]()
        for argument in self._setting.trace.arguments:
            inside = argument.module == container or argument.module.startswith(container + ".")
            if not inside or argument.sources or argument.key in {key for _, key, _ in found}:
                continue
            dims = [
                dim
                for dim, size in enumerate(argument.shape)
                if size == heads.heads
                or (dim == 0 and size > heads.heads and size % heads.heads == 0 and len(argument.shape) == 3)
            ]
            if dims and len(argument.shape) > 2:
                found[self._pattern(argument.module), argument.key, dims[0]] = None
        if found:
            yield tuple(found)


def kinds_of(sites: Iterable[Site], setting: Setting, packings: Mapping[str, Packing] | None = None) -> list[Kind]:
    """Sites that look alike, or share a pattern of what they cut, together. packings: known ones, by a product's pattern."""
    found: list[tuple[set[str], list[Site]]] = []
    for site in sites:
        own = {setting.names.pattern(member.name) for member in (*site.columns, *site.rows)}
        joined = [entry for entry in found if entry[0] & own]
        for entry in joined:
            found.remove(entry)
        together = [one for entry in joined for one in entry[1]]
        found.append((own.union(*(entry[0] for entry in joined)), [*together, site]))
    return [Kind(together, setting, packings) for _, together in found]


def _from_the_ends(size: int) -> list[int]:
    """The order in which sizes of subsets are tried: all, none, all but one, one, ..."""
    return sorted(range(size + 1), key=lambda number: (min(number, size - number), -number))
