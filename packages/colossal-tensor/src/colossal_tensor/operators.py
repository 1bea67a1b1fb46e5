"""How an operator finds the ranks it talks to. An operator's arguments can only be tensors, numbers and text, so that torch.compile
keeps it whole: what it needs is a `Route`, found by its key when the operator runs.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from colossal_core.collectives import Axes, Collectives, ReduceOp

_NUMBERS = itertools.count()
_ROUTES: weakref.WeakValueDictionary[str, Route] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Route:
    """The group of ranks over `axes`, as an operator sees it. tag: of its calls, in the ledger and in reports. symmetric: the group's
    name for torch's operators on symmetric memory, "" where they are not used. A copy is the route itself.
    """

    collectives: Collectives
    axes: Axes
    tag: str
    symmetric: str = ""
    size: int = field(init=False)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.collectives.size(self.axes))
        object.__setattr__(self, "key", f"route.{next(_NUMBERS)}")
        _ROUTES[self.key] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        del memo
        return self


def route_of(key: str) -> Route:
    """The route with this key; whoever calls an operator keeps it alive."""
    return _ROUTES[key]


def all_reduced(tensor: torch.Tensor, key: str, op: ReduceOp) -> torch.Tensor:
    """The reduction over a route's ranks, without a gradient, on the communicator of the differentiable collectives."""
    result: torch.Tensor = torch.ops.colossal_tensor.all_reduced(tensor, key, op)
    return result


def _all_reduced_now(tensor: torch.Tensor, key: str, op: ReduceOp) -> torch.Tensor:
    route = route_of(key)
    output = tensor.detach().clone(memory_format=torch.contiguous_format)
    route.collectives.start_all_reduce(output, route.axes, op=op, use="compute", tag=route.tag).wait()
    return output


def _same_shape(tensor: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


LIBRARY = torch.library.Library("colossal_tensor", "DEF")  # type: ignore[no-untyped-call]
"""torch's own table of operators; it lives as long as the process."""

LIBRARY.define("all_reduced(Tensor x, str key, str op) -> Tensor")  # type: ignore[no-untyped-call]
LIBRARY.impl("all_reduced", _all_reduced_now, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("colossal_tensor::all_reduced", _same_shape, lib=LIBRARY)
