"""What may be changed in a method's source so that it calls ops: one class for each kind, all of one form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Protocol

from torch import nn

from colossal_core.model_ops import gates, residuals, rotations
from colossal_core.model_ops.norms import Norm
from colossal_core.model_ops.proving import attributes_of
from colossal_core.model_ops.remaking import Change, Place, Source

Function = Callable[..., Any]


class Edit(Protocol):
    """ops: any one of which can take the place, the best first."""

    @property
    def ops(self) -> tuple[str, ...]: ...

    def changes(self, op: str, own: str, name: str) -> dict[Place, Change]:
        """What changes in the source for one of the ops, which is called by `name`. own: what the method calls its module."""

    def bound(self, op: str, function: Function) -> Function:
        """What `name` is: the op's implementation, called as this place needs it."""


@dataclass(frozen=True)
class Gate:
    """A product of an activation and something."""

    product: gates.Product
    activation: gates.Activation

    @property
    def ops(self) -> tuple[str, ...]:
        halves = self.product.halves is not None
        return (self.activation.packed, self.activation.op) if halves else (self.activation.op,)

    def changes(self, op: str, own: str, name: str) -> dict[Place, Change]:
        del own
        make = gates.packed_changes_of if op == self.activation.packed else gates.changes_of
        return make(self.product, name)

    def bound(self, op: str, function: Function) -> Function:
        make = gates.packed if op == self.activation.packed else gates.gated
        return make(self.activation, function)


@dataclass(frozen=True)
class Turn:
    """A call of a function that rotates queries and keys."""

    place: Place
    rotation: rotations.Rotation
    original: FunctionType

    @property
    def ops(self) -> tuple[str, ...]:
        return ("rotary",)

    def changes(self, op: str, own: str, name: str) -> dict[Place, Change]:
        del op, own
        return rotations.changes_of(self.place, name)

    def bound(self, op: str, function: Function) -> Function:
        del op
        return rotations.rotated(self.rotation, function, self.original)


@dataclass(frozen=True)
class Sum:
    """A residual addition and the norm after it. number: sets it apart from others in the method."""

    addition: residuals.Addition
    norm: Norm
    number: int

    @property
    def ops(self) -> tuple[str, ...]:
        return (residuals.OPS[self.norm.op],)

    def changes(self, op: str, own: str, name: str) -> dict[Place, Change]:
        del op
        return residuals.changes_of(self.addition, own, name, self.number)

    def bound(self, op: str, function: Function) -> Function:
        del op
        return residuals.added_and_normed(self.norm, function)


@dataclass
class Finder:
    """Finds edits, and remembers what it has proven. norms: what the norms of the model compute, by the module's id."""

    norms: Mapping[int, Norm]

    def __post_init__(self) -> None:
        self._activations: dict[object, gates.Activation | None] = {}

    def edits(self, module: nn.Module, source: Source) -> Iterator[Edit]:
        """Everything that can be changed in one method of a module."""
        yield from self._gates(module, source)
        yield from self._turns(source)
        for number, addition in enumerate(residuals.additions_in(source)):
            norm = self.norms.get(id(getattr(module, addition.attribute, None)))
            if norm is not None:
                yield Sum(addition, norm, number)

    def _gates(self, module: nn.Module, source: Source) -> Iterator[Gate]:
        for product, call in gates.products_in(source):
            called = gates.called_by(call, source.function, module)
            if called is None:
                continue
            keywords = tuple(gates.keywords_of(call).items())
            key: object = (id(called), keywords)
            if isinstance(called, nn.Module):
                key = (type(called), repr(called), attributes_of(called), keywords)
            if key not in self._activations:
                self._activations[key] = gates.find_activation(called, dict(keywords))
            activation = self._activations[key]
            if activation is not None and not (isinstance(called, nn.Module) and gates.is_changed(called)):
                yield Gate(product, activation)

    @staticmethod
    def _turns(source: Source) -> Iterator[Turn]:
        for name, place in rotations.calls_in(source):
            original = source.function.__globals__.get(name)
            rotation = rotations.find_rotation(original) if isinstance(original, FunctionType) else None
            if rotation is not None and isinstance(original, FunctionType):
                yield Turn(place, rotation, original)
