"""What this rank keeps of each parameter, and the one interface through which it is gathered, released and reduced.

`ParameterState` is implemented by the strategy of phase shard_state: core's own `LocalState` (nothing sharded) or colossal-zero. The
step, the optimizer, the checkpoint and the norm see only this.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from colossal_core.layout import ParameterLayout


@dataclass
class Shard:
    """One parameter's state on this rank, in its `state` placement.

    parameter: the module's parameter, in the compute dtype and placement. master: what the optimizer updates, in the master dtype: local
    elements, 1-D under a flat cut, else of the local shape; the same storage as `parameter` where dtype and placement agree.
    gradient: the reduced gradient, of master's shape, in the gradient dtype; None before the first backward pass and for frozen parameters.
    """

    layout: ParameterLayout
    parameter: nn.Parameter
    master: nn.Parameter
    gradient: torch.Tensor | None = None


class ParameterState(Protocol):
    """All shards of this rank, and the movements between `state` and `compute`.

    `gather`, `release` and `reduce` are asked for by hooks (`gathering.py`). A state that keeps its compute copy for the whole step
    answers `gather` by waiting for the last `publish` and `release` by nothing. Units that this rank does not hold may be named in every
    call, and are ignored.
    """

    @property
    def shards(self) -> Mapping[str, Shard]:
        """By full name, frozen parameters included, in the order of `named_parameters()`: of the parameters that this rank holds, which are
        those whose layout is present at its coordinate. A pipeline stage may hold none that is trained.
        """

    def fill(self, full_name: str, full: torch.Tensor) -> None:
        """Sets master and compute copy from the full value (any floating dtype, any device). No communication. Nothing where this rank does
        not hold the parameter.
        """

    def begin_step(self) -> None:
        """Clears the gradients of the last step."""

    def begin_backward(self, *, last: bool, units: Collection[str] | None = None) -> None:
        """Before the backward pass of a microbatch, or that of one stage; one is open at a time.

        units: whose gradients it brings; None: of all. last: it completes the step's gradients of those units, where several stages of
        this rank use a unit: as far as this stage is concerned.
        """

    def prefetch(self, unit: str) -> None:
        """Starts what `gather` of the unit will wait for, beside the computation that follows."""

    def gather(self, unit: str) -> None:
        """Makes the compute copy of a unit's parameters readable by work that follows. A unit: a block, or a module outside every block."""

    def release(self, unit: str) -> None:
        """The compute copy of a unit's parameters is not needed until the next `gather`."""

    def reduce(self, unit: str) -> None:
        """The unit's gradients of this microbatch are there: starts their reduction over each layout's `reduce_axes`."""

    def end_backward(self) -> None:
        """After the backward pass: whatever of the units that its begin has opened is still open is accumulated, reduced and released."""

    def finish_reduce(self) -> None:
        """Once a step, after the last backward pass: waits for every reduction; `gradient` is set everywhere, of unused parameters too."""

    def copies(self, masters: Sequence[nn.Parameter]) -> list[torch.Tensor] | None:
        """Inside the optimizer's step: where the new values of these masters go too, in the compute dtype, each of its master's shape. Who
        asks writes all of them before it calls `updated`. None: nowhere; they are carried later.
        """

    def updated(self, masters: Sequence[nn.Parameter]) -> None:
        """Inside the optimizer's step: these masters have their new values. May start carrying them into the compute copies."""

    def publish(self) -> None:
        """After the optimizer: carries the masters into the compute copies. May leave communication on its way for `gather`."""

    def wait_published(self) -> None:
        """Every compute copy is readable: for evaluation, saving and user code between steps."""
