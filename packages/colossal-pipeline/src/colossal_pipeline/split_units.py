"""The units of a stage with their backward passes cut in two: in the graph of the stage each is one node, which runs its input part and
leaves its weight part for later (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", name the two B and W).

So a block is cut by itself, by whatever runner it has, and one that is recomputed runs again once, for both parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from colossal_core.blocks import EagerBlockRunner
from colossal_core.dataflow import tensors_in, with_tensors
from colossal_core.split_backward import Gradients


@dataclass
class UnitRunners:
    """The runners of all units of a rank, by name; each keeps what microbatches have left between their parts."""

    runners: dict[str, EagerBlockRunner] = field(default_factory=dict)
    found: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)

    def add(self, unit: str, module: nn.Module, call: Callable[..., Any]) -> None:
        self.runners[unit] = EagerBlockRunner(module, self._accumulate, call=call)

    def _accumulate(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        self.found.append((parameter, gradient))


class SplitCalls:
    """The unit calls of one pass through a stage. number: of the pass, which no other that is under way has."""

    def __init__(self, units: UnitRunners, number: int) -> None:
        self._units = units
        self._number = number
        self._called: list[str] = []
        self.anchors: list[Tensor] = []

    def run(self, unit: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the unit returns; the gradient of it runs the unit's input part."""
        key = self._key(len(self._called))
        self._called.append(unit)
        given = (args, dict(kwargs))
        anchor = torch.zeros((), requires_grad=True)  # a node is made where a parameter is trained, and no input is
        self.anchors.append(anchor)
        structure: list[Any] = []
        runner = self._units.runners[unit]
        outputs = _Cut.apply(runner, key, given, structure, anchor, *tensors_in(given))  # type: ignore[no-untyped-call]
        return with_tensors(structure[0], iter(outputs))

    def parameter_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The weight parts of all units, the last one's first, as the input parts ran."""
        for index, unit in reversed(list(enumerate(self._called))):
            runner, key = self._units.runners[unit], self._key(index)
            if runner.has_split(key):
                runner.backward_weight(key)
                found, self._units.found = self._units.found, []  # taken, so that no error leaves them to the next pass
                yield from found
            else:
                runner.forget(key)
        self._called.clear()

    def abandon(self) -> None:
        """Drops what the units keep of this pass."""
        for index, unit in enumerate(self._called):
            self._units.runners[unit].forget(self._key(index))
        self._called.clear()

    def _key(self, index: int) -> int:
        return self._number * MOST_CALLS + index


MOST_CALLS = 1 << 20
"""Of units in one pass through a stage."""


class _Cut(torch.autograd.Function):
    """A unit as one node. The gradients of its inputs are those of its input part; its parameters are no inputs of the node."""

    @staticmethod
    def forward(
        ctx: Any,
        runner: EagerBlockRunner,
        key: int,
        given: Any,
        structure: list[Any],
        anchor: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        del anchor
        args, kwargs = with_tensors(given, iter(tensors))
        with torch.enable_grad():
            output = runner.forward(key, args, kwargs)
        structure.append(output)
        made = tuple(tensors_in(output))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(one for one, differs in zip(made, runner.differs(key), strict=True) if not differs)
        )
        ctx.runner, ctx.key = runner, key
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        found: Gradients = ctx.runner.backward_input(ctx.key, gradients)
        return (None, None, None, None, None, *found)
