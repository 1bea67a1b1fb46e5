"""What is cut together: the data that rules propose, the proof accepts, layouts are made from and `apply` carries out.

A *group* is a set of parameters between an entry and an exit: at the entry every rank has the same activations (or gathers them, where the
sequence is sharded between groups), inside each rank computes with its part of the parameters, at the exit the ranks' results are summed
(or summed and scattered). So inside a group every gradient of a parameter that is not cut, and of the activations that enter, is one
summand of the true one (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2).

Names are patterns: `*` stands for the number of a block (`model.layers.*.self_attn.q_proj`). A group found on a small model of the same
kind so names the modules of the model itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Packing = Literal["whole", "two", "three", "qkv"]
"""What one dimension holds one after another: one weight; two or three of the same size (gate and up; query, key and value); query, key and
value of num_heads, num_key_value_heads and num_key_value_heads heads."""


@dataclass(frozen=True)
class ParameterCut:
    """One parameter that is cut. parameter: pattern of its full name. dim: the dimension, counted from 0. packing: what lies along it.

    shared: it is made of key/value heads, which several ranks hold alike where there are more ranks than such heads. optional: not every
    place where the group stands has it (a bias of scores that only the first block makes).
    """

    parameter: str
    dim: int
    packing: Packing = "whole"
    shared: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Entry:
    """A module whose arguments enter the group. arguments: positions ("0") or keywords ("hidden_states") of tensors on the activation
    stream: replicated in the forward pass, their gradients summed in the backward pass; under sequence parallelism gathered and
    reduce-scattered instead. columns: modules that multiply the first of these arguments, as it is, with a weight that is cut.
    """

    module: str
    arguments: tuple[str, ...] = ("0",)
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exit:
    """A module whose output leaves the group: summed over the ranks (sequence parallelism: reduce-scattered). output: index of the tensor
    where the module returns a tuple. biases: parameters inside that every rank would add to the sum: the first one alone adds them.
    gathers: instead, the ranks' results are put beside one another in the last dimension, evenly: for a product that has no partner.
    """

    module: str
    output: int = 0
    biases: tuple[str, ...] = ()
    gathers: bool = False


@dataclass(frozen=True)
class Scaled:
    """An integer attribute of a module (or of its config, `config.num_attention_heads`, then on a copy of the config of its own) that a
    forward pass reads and that shrinks with the part of a rank. shared: it counts key/value heads. ratio: it counts query heads for each
    key/value head, which changes only where ranks share such heads.
    """

    module: str
    attribute: str
    shared: bool = False
    ratio: bool = False


@dataclass(frozen=True)
class Units:
    """In how many equal units a group's dimensions are cut. kind `features`: single elements, cut in multiples that suit a matrix product.
    kind `heads`: attention heads, or groups of query heads that share a key/value head.

    heads, key_value_heads: where their numbers are read, as (module pattern, attribute); None for key_value_heads: as many as heads.
    """

    kind: Literal["features", "heads"]
    heads: tuple[str, str] | None = None
    key_value_heads: tuple[str, str] | None = None


@dataclass(frozen=True)
class Group:
    """A group of the kind described above. name: pattern of the innermost module that holds it all, for messages.

    sliced: arguments of a module that hold all heads along a dimension and of which each rank takes its part, as (module, argument, dim).
    dropouts: modules inside whose dropout sees a part of the heads or features, as (module, dimension of its argument).
    """

    name: str
    cuts: tuple[ParameterCut, ...]
    entries: tuple[Entry, ...]
    exits: tuple[Exit, ...]
    units: Units
    scaled: tuple[Scaled, ...] = ()
    sliced: tuple[tuple[str, str, int], ...] = ()
    dropouts: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """The table of embeddings and the head, cut by words. embedding, head: module names, "" where one is not cut. gathered: the head's
    outputs are gathered whole, because something reads them that is not core's loss.
    """

    embedding: str = ""
    head: str = ""
    gathered: bool = False


@dataclass(frozen=True)
class Stream:
    """Sequence parallelism: between groups the activations are cut along the sequence. entries: where they are cut (the first block of each
    chain); exits: modules whose output is gathered again (the last block). gathered_at: modules whose input is gathered instead (a head
    that is cut itself, with everything token-wise before it). whole: patterns of modules that no group could be found in: every rank
    computes them on the whole sequence, alike.
    """

    entries: tuple[Entry, ...]
    exits: tuple[Exit, ...] = ()
    gathered_at: tuple[Entry, ...] = ()
    whole: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class TensorPlan:
    """Everything that was decided for a kind of model. partial: patterns of parameters that are whole on every rank while each rank's
    gradient is a summand. notes: for the reader of the plan: what stays replicated, and why. source: of each group by its name: `rules`,
    `transformers` or `graph`.
    """

    groups: tuple[Group, ...] = ()
    vocabulary: Vocabulary = Vocabulary()
    stream: Stream | None = None
    partial: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source: Mapping[str, str] = field(default_factory=dict)


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(r"(\d+)".join(re.escape(part) for part in pattern.split("*")) + r"\Z")


def matches(pattern: str, name: str) -> bool:
    """Whether a name is one of those that a pattern stands for."""
    return _expression(pattern).match(name) is not None


def expand(pattern: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names that a pattern stands for, in their order."""
    return tuple(name for name in names if matches(pattern, name))


def instances(group: Group, modules: Iterable[str], parameters: Iterable[str]) -> Iterator[Group]:
    """The group at every place where it stands in a model, with names instead of patterns. A place that lacks one of the parameters that
    are not optional (a dense layer among layers with experts) is none.
    """
    known = tuple(parameters)
    for name in modules:
        found = _expression(group.name).match(name)
        if found is None:
            continue
        numbers = found.groups()
        cuts = tuple(
            replace(cut, parameter=full)
            for cut in group.cuts
            for full in expand(bound(cut.parameter, numbers), known) or ([] if cut.optional else [""])
        )
        if cuts and all(cut.parameter for cut in cuts):
            rest = {field.name: _bind(getattr(group, field.name), numbers) for field in fields(group)}
            yield replace(group, **{**rest, "cuts": cuts})


def numbers_in(pattern: str, name: str) -> tuple[str, ...]:
    """What the stars of a pattern stand for in a name that it matches."""
    found = _expression(pattern).match(name)
    assert found is not None, f"{name} is no {pattern}"
    return found.groups()


def bound(pattern: str, numbers: tuple[str, ...]) -> str:
    """The pattern with its first stars replaced by numbers."""
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern


def _bind(value: T, numbers: tuple[str, ...]) -> T:
    found: Any = value
    if isinstance(value, str):
        found = bound(value, numbers)
    elif isinstance(value, tuple):
        found = tuple(_bind(item, numbers) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        found = replace(value, **{field.name: _bind(getattr(value, field.name), numbers) for field in fields(value)})
    return found  # type: ignore[no-any-return]
