"""From groups to layouts: how every parameter lies along `tp`. Pure data, the same on every rank, made before any rank starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from colossal_core.errors import Problem
from colossal_core.layout import DimCut, ParameterLayout, Placement
from colossal_core.mesh import DerivedAxis, MeshLayout
from colossal_tensor.group import Group, ParameterCut, TensorPlan, expand, instances
from colossal_tensor.parts import Numbers, Parts, parts_of, segments, sizes_that_work

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy

AXIS = "tp"
_WORDS = 64
"""A rank's part of a large vocabulary is a multiple of this."""
_LARGE_VOCABULARY = 4096


@dataclass(frozen=True)
class Placed:
    """A group where it stands in a model, and how it is cut. heads: numbers of query and of key/value heads of the whole group."""

    group: Group
    parts: Parts
    heads: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Cutting:
    """What `apply` needs beside the layouts. placed: the groups, by name. words: [start, stop) of the vocabulary on each rank, empty where
    it is whole; padded_words: the size that each rank's part has.
    """

    placed: tuple[Placed, ...] = ()
    words: tuple[tuple[int, int], ...] = ()
    padded_words: int = 0


@dataclass(frozen=True)
class Laid:
    """The outcome. mesh: with the derived axes that layouts name."""

    mesh: MeshLayout
    layouts: Mapping[str, ParameterLayout]
    cutting: Cutting = Cutting()
    problems: tuple[Problem, ...] = ()


def tensor_layouts(
    plan: TensorPlan, anatomy: ModelAnatomy, layouts: Mapping[str, ParameterLayout], mesh: MeshLayout
) -> Laid:
    """Cuts what the plan says over `tp`. Problems name what cannot be cut into so many parts, and sizes that work."""
    return _Layer(plan, anatomy, layouts, mesh).laid()


def numbers_of(anatomy: ModelAnatomy) -> Numbers:
    """Every integer that a module says of itself, by (module, attribute)."""
    return {(fact.name, name): value for fact in anatomy.modules for name, value in fact.numbers}


def placed_groups(plan: TensorPlan, anatomy: ModelAnatomy, num_ranks: int) -> tuple[list[Placed], list[Problem]]:
    """Every group at every place where it stands, with its parts; and those that cannot be cut into so many."""
    numbers, shapes = numbers_of(anatomy), {fact.full_name: fact.shape for fact in anatomy.parameters}
    modules = [fact.name for fact in anatomy.modules]
    placed, problems = [], {}
    for pattern in plan.groups:
        for group in instances(pattern, modules, shapes):
            heads = heads_of(group, numbers)
            widths = {cut.parameter: _width(cut, shapes[cut.parameter], heads) for cut in group.cuts}
            found = parts_of(group, numbers, widths, num_ranks)
            if found is not None:
                placed.append(Placed(group, found, heads))
            elif pattern.name not in problems:
                problems[pattern.name] = _impossible(group, numbers, widths, num_ranks)
    return placed, list(problems.values())


def heads_of(group: Group, numbers: Numbers) -> tuple[int, int]:
    """Numbers of query heads and of key/value heads; (1, 1) where the group has none."""
    if group.units.heads is None:
        return 1, 1
    heads = numbers.get(group.units.heads, 1)
    shared = group.units.key_value_heads
    return heads, heads if shared is None else numbers.get(shared, heads)


def _width(cut: ParameterCut, shape: tuple[int, ...], heads: tuple[int, int]) -> int:
    start, stop = next(iter(segments(shape[cut.dim], cut.packing, heads)))
    return stop - start


def _impossible(group: Group, numbers: Numbers, widths: Mapping[str, int], num_ranks: int) -> Problem:
    works = sizes_that_work(lambda size: parts_of(group, numbers, widths, size) is not None, num_ranks)
    if group.units.kind == "features":
        what = f"{group.name} is {min(widths.values())} features wide"
    else:
        heads, shared = heads_of(group, numbers)
        what = f"{group.name} has {heads} heads" + (f" and {shared} key/value heads" if shared != heads else "")
    remedy = f"use {' or '.join(map(str, works))}, or a rule `replicate` for it" if works else "use size: 1"
    return Problem("parallel.tensor.size", f"{what}, which {num_ranks} ranks cannot share", remedy, num_ranks)


class _Layer:
    """Makes the layouts of one model."""

    def __init__(
        self, plan: TensorPlan, anatomy: ModelAnatomy, layouts: Mapping[str, ParameterLayout], mesh: MeshLayout
    ) -> None:
        self._plan, self._anatomy, self._mesh = plan, anatomy, mesh
        self._layouts = dict(layouts)
        self._size = mesh.size(AXIS)

    def laid(self) -> Laid:
        placed, problems = placed_groups(self._plan, self._anatomy, self._size)
        for one in placed:
            for cut in one.group.cuts:
                self._cut(cut, one.parts, one.heads)
        words, padded = self._cut_vocabulary()
        for pattern in self._plan.partial:
            for name in expand(pattern, self._layouts):
                self._make_partial(name)
        return Laid(self._mesh, self._layouts, Cutting(tuple(placed), words, padded), tuple(problems))

    def _cut(self, cut: ParameterCut, parts: Parts, heads: tuple[int, int]) -> None:
        layout = self._layouts[cut.parameter]
        pieces = list(segments(layout.shape[cut.dim], cut.packing, heads))
        intervals = []
        for rank in range(self._size):
            (first, last), whole = parts.of(rank, shared=cut.shared)
            widths = [(stop - start) // whole for start, stop in pieces]
            intervals.append(
                tuple(
                    (start + first * width, start + last * width)
                    for (start, _), width in zip(pieces, widths, strict=True)
                )
            )
        if cut.shared and parts.copies > 1:
            axis, copies = self._head_axes(parts)
            kept = tuple(intervals[:: parts.copies])
            self._place(cut.parameter, DimCut(cut.dim, (axis,), kept), copied=copies)
        else:
            self._place(cut.parameter, DimCut(cut.dim, (AXIS,), tuple(intervals)))

    def _head_axes(self, parts: Parts) -> tuple[str, str]:
        """`tp` as key/value heads x ranks that hold the same one, the latter next to one another."""
        axis, copies = f"tp_heads{parts.shared_whole}", f"tp_copies{parts.copies}"
        for derived in (
            DerivedAxis(axis, (AXIS,), parts.shared_whole, parts.copies),
            DerivedAxis(copies, (AXIS,), parts.copies),
        ):
            if derived.name not in self._mesh.axis_names:
                self._mesh = self._mesh.with_axis(derived)
        return axis, copies

    def _place(self, name: str, cut: DimCut, copied: str | None = None) -> None:
        layout = self._layouts[name]

        def changed(placement: Placement) -> Placement:
            replicated = tuple(axis for axis in placement.replicated if axis != AXIS)
            partial = placement.partial
            if copied is not None:
                replicated += (copied,)
                partial += (copied,) if layout.trainable else ()
            return replace(placement, cuts=(*placement.cuts, cut), replicated=replicated, partial=partial)

        self._layouts[name] = replace(layout, compute=changed(layout.compute), state=changed(layout.state))

    def _make_partial(self, name: str) -> None:
        layout = self._layouts[name]
        if not layout.trainable or AXIS in layout.compute.cut_axes:
            return
        self._layouts[name] = replace(
            layout,
            compute=replace(layout.compute, partial=(*layout.compute.partial, AXIS)),
            state=replace(layout.state, partial=(*layout.state.partial, AXIS)),
        )

    def _cut_vocabulary(self) -> tuple[tuple[tuple[int, int], ...], int]:
        """Embedding and head by words: the same consecutive range of both on a rank, the last ones padded."""
        vocabulary = self._plan.vocabulary
        names = [f"{module}.weight" for module in (vocabulary.embedding, vocabulary.head) if module]
        full = {alias: name for name, layout in self._layouts.items() for alias in (name, *layout.aliases)}
        if not names:
            return (), 0
        total = self._layouts[full[names[0]]].shape[0]
        words, padded = word_ranges(total, self._size)
        if vocabulary.head:
            names.append(f"{vocabulary.head}.bias")
        for name in dict.fromkeys(full[name] for name in names if name in full):
            padding = tuple(padded - (stop - start) for start, stop in words)
            self._place(name, DimCut(0, (AXIS,), tuple((word,) for word in words), padding))
        return words, padded


def word_ranges(total: int, num_ranks: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Each rank's [start, stop) of a vocabulary, and the padded size that all parts have."""
    padded = -(-total // num_ranks)
    if padded >= _LARGE_VOCABULARY:
        padded = -(-padded // _WORDS) * _WORDS
    return tuple((min(rank * padded, total), min((rank + 1) * padded, total)) for rank in range(num_ranks)), padded
