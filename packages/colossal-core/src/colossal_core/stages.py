"""The seam between core's runner and a pipeline: how a forward pass runs one stage of the model only.

The runner calls the model as ever, inside `Stages.running`. On every stage but the last the pass does not come to its end: when the last
block of the stage has run, `StageEnd` leaves it, with the tensors that the next stage begins with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class StageEnd(BaseException):
    """Not an error, and nothing for a model to catch: the end of a stage's forward pass. outputs: what crosses to the next stage, in the
    plan's order.
    """

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        super().__init__("the stage has run")
        self.outputs = tuple(outputs)


class StagePass(Protocol):
    """One forward pass of one stage, and what is left of it to do."""

    @property
    def anchors(self) -> Sequence[Tensor]:
        """Leaves behind which the parts of a cut pass stand: a gradient asked for them runs the input part of every one."""

    def parameter_gradients(self) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """The weight parts of a cut pass, once, after the input parts: gradients of parameters, of some in several summands."""

    def abandon(self) -> None:
        """Drops what is left to do, of a step that an error has ended."""


class Stages(Protocol):
    """The stages of a model on one rank; set in `ApplyContext.stages` by the strategy that has cut it."""

    def running(self, stage: int, received: Sequence[Tensor], *, split: bool) -> AbstractContextManager[StagePass]:
        """A context in which one call of the model runs one stage, from what the stage before it sent. split: its backward pass will be
        cut into input parts and weight parts.
        """
