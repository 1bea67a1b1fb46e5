"""The graph rule: which matrix products are cut together, read off a traced forward pass.

A *row* reads other products' results and nothing of the stream, and its own result meets the stream. The products that feed rows alone are
its *columns*; others between the stream and the row (a compressed key, a router) stay whole *inside*. Every row with its columns is a site;
the sites of all layers that look alike are one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from colossal_tensor.search.trace import MIXED, STREAM, Trace


@dataclass(frozen=True)
class Factor:
    """A parameter of a product with the dimension to cut, when its product is a column or a row. size: of that dimension."""

    parameter: str
    dim: int
    size: int


@dataclass(frozen=True)
class Member:
    """A column or a row: what is cut in it. name: of the weight. biases: parameters added to its result, with their last dimension."""

    name: str
    factors: tuple[Factor, ...]
    biases: tuple[Factor, ...]

    @property
    def size(self) -> int:
        return self.factors[0].size


@dataclass(frozen=True)
class Site:
    """One place where a group can stand. columns, rows: cut. whole: products inside that stay whole. others: parameters inside that are
    part of no product (a norm, a learned bias of scores), with the shape of each. by_head: features meet one another on the way.
    """

    columns: tuple[Member, ...]
    rows: tuple[Member, ...]
    whole: tuple[str, ...]
    others: tuple[tuple[str, tuple[int, ...]], ...]
    by_head: bool

    @property
    def labels(self) -> frozenset[str]:
        return frozenset((*(member.name for member in (*self.columns, *self.rows)), *self.whole))


@dataclass(frozen=True)
class Names:
    """The patterns of a model's names: `*` for the number of a block, or of an element in a list of modules of one class."""

    numbered: frozenset[str]

    def pattern(self, name: str) -> str:
        parts = name.split(".")
        return ".".join("*" if ".".join(parts[: i + 1]) in self.numbered else part for i, part in enumerate(parts))


def names_of(model: nn.Module, blocks: Iterable[str]) -> Names:
    """Which modules are told apart by their number alone."""
    numbered = {name for name in blocks if name.rpartition(".")[2].isdigit()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({_kind(child) for child in module}) == 1:
            numbered |= {f"{name}.{index}".lstrip(".") for index in range(len(module))}
    return Names(frozenset(numbered))


def _kind(module: nn.Module) -> tuple[object, ...]:
    return type(module), *((name, tuple(value.shape)) for name, value in module.named_parameters())


def find_sites(trace: Trace, shapes: Mapping[str, tuple[int, ...]], heads: Iterable[str]) -> tuple[Site, ...]:
    """Every site of a trace, in order of execution. heads: products that give the model's result (a language model's head)."""
    graph = _Graph(trace, shapes, frozenset(heads))
    return graph.sites()


def styled_sites(
    trace: Trace, shapes: Mapping[str, tuple[int, ...]], styles: Mapping[str, str]
) -> tuple[tuple[Site, ...], tuple[str, ...]]:
    """Sites of products that somebody calls `column` or `row`, by weight: each row with the columns in the innermost module that holds
    both. Also the weights that found no partner.
    """
    graph = _Graph(trace, shapes, frozenset())
    known = {label: style for label, style in styles.items() if label in graph.labels}
    columns = [label for label, style in known.items() if style == "column"]
    places: dict[str, set[str]] = {}
    for row in (label for label, style in known.items() if style == "row"):
        place = row
        while place and not any(column.startswith(place + ".") for column in columns):
            place = place.rpartition(".")[0]
        places.setdefault(place, set()).add(row)
    found, used = [], set()
    for place, rows in places.items():
        own = (
            {column for column in columns if column.startswith(place + ".") and column not in used} if place else set()
        )
        if own:
            found.append(graph.site(rows, own))
            used |= rows | own
    return tuple(found), tuple(label for label in known if label not in used)


def column_of(trace: Trace, shapes: Mapping[str, tuple[int, ...]], label: str) -> Member:
    """What is cut of one product that has no partner."""
    return _Graph(trace, shapes, frozenset()).member(label, as_row=False)


class _Graph:
    """The products of a trace and who reads whom."""

    def __init__(self, trace: Trace, shapes: Mapping[str, tuple[int, ...]], heads: frozenset[str]) -> None:
        self._trace, self._shapes, self._heads = trace, shapes, heads
        self._sources: dict[str, frozenset[str]] = {}
        self._mixed: set[str] = set()
        for product in trace.products:
            known = self._sources.get(product.label, frozenset())
            self._sources[product.label] = known | (product.sources - {MIXED})
            if MIXED in product.sources:
                self._mixed.add(product.label)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def sites(self) -> tuple[Site, ...]:
        rows = [label for label in self._sources if self._is_row(label)]
        found: list[tuple[set[str], set[str]]] = []
        for row in rows:
            columns = {label for label in self._sources[row] if self._is_column(label, frozenset(rows))}
            if not columns:
                continue
            joined = [entry for entry in found if entry[1] & columns]
            for entry in joined:
                found.remove(entry)
            found.append(
                (
                    {row}.union(*(entry[0] for entry in joined)),
                    columns.union(*(entry[1] for entry in joined)),
                )
            )
        return tuple(self.site(rows_of, columns) for rows_of, columns in found)

    def _is_row(self, label: str) -> bool:
        sources = self._sources[label]
        return bool(sources) and STREAM not in sources and label in self._trace.merged and label not in self._heads

    def _is_column(self, label: str, rows: frozenset[str]) -> bool:
        readers = {reader for reader, sources in self._sources.items() if label in sources}
        return label not in self._trace.merged and readers <= rows and label not in rows

    def site(self, rows: set[str], columns: set[str]) -> Site:
        inside: set[str] = set()
        ahead = set().union(*(self._sources[label] for label in rows | columns)) - {STREAM} - columns
        while ahead - inside:
            inside |= ahead
            ahead = set().union(*(self._sources[label] for label in ahead)) - {STREAM} - columns - rows
        ordered = [label for label in self._sources if label in rows | columns]
        biases = {bias for label in ordered for bias in self._biases(label)}
        others = tuple(
            (name, self._shapes[name])
            for name, met in self._trace.met.items()
            if STREAM not in met and met & columns and name not in biases
        )
        return Site(
            columns=tuple(self.member(label, as_row=False) for label in ordered if label in columns),
            rows=tuple(self.member(label, as_row=True) for label in ordered if label in rows),
            whole=tuple(label for label in self._sources if label in inside - rows),
            others=others,
            by_head=any(row in self._mixed for row in rows),
        )

    def member(self, label: str, *, as_row: bool) -> Member:
        factors: dict[str, Factor] = {}
        for product in self._trace.products:
            outward = product.parameter == label or product.second
            inward = product.parameter == label or not product.second
            if product.label == label and (inward if as_row else outward):
                dim = product.contracted if as_row else product.kept
                factors[product.parameter] = Factor(product.parameter, dim, self._shapes[product.parameter][dim])
        first = sorted(factors.values(), key=lambda factor: factor.parameter != label)
        return Member(label, tuple(first), tuple(self._biases(label).values()))

    def _biases(self, label: str) -> dict[str, Factor]:
        """Parameters beside a weight that nothing but its result was combined with, and that end with its size."""
        owner = label.rpartition(".")[0]
        product = next(product for product in self._trace.products if product.parameter == label)
        size = self._shapes[label][product.kept]
        found = {}
        for name, met in self._trace.met.items():
            shape = self._shapes.get(name, ())
            beside = name.rpartition(".")[0] == owner and met - {MIXED} == {label}
            if beside and shape and shape[-1] == size and len(shape) < len(self._shapes[label]):
                found[name] = Factor(name, len(shape) - 1, size)
        return found
