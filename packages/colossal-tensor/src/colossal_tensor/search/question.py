"""What a plan depends on: two models with one answer to this may share a plan."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from colossal_tensor.group import Group, matches
from colossal_tensor.search.rules import Rule

if TYPE_CHECKING:
    from colossal_core.specimen import Specimen


@dataclass(frozen=True)
class Question:
    """What a plan depends on. key: of the specimen. copies: whether ranks hold the same key/value head. whole_logits:
    whether something other than core's loss reads the outputs. shapes: of the model's parameters, by pattern; frozen: patterns of those
    that are not trained.
    """

    key: str
    size: int
    rules: tuple[Rule, ...]
    sequence_parallel: bool
    copies: bool
    whole_logits: bool
    tensor_plan: tuple[tuple[str, str], ...]
    shapes: frozenset[tuple[str, tuple[int, ...]]]
    frozen: frozenset[str]
    specimen: Specimen = field(compare=False, repr=False)

    @property
    def data(self) -> tuple[object, ...]:
        """All of it that answers are kept by: without the specimen, which holds a model."""
        return tuple(getattr(self, part.name) for part in fields(self) if part.compare)

    def divides(self, group: Group) -> bool:
        """Whether the model's sizes are divided evenly by the ranks wherever the group stands."""
        return all(
            shape[cut.dim] % self.size == 0
            for cut in group.cuts
            for pattern, shape in self.shapes
            if matches(cut.parameter, pattern.replace("*", "0"))
        )
