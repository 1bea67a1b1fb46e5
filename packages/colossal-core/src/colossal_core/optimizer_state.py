"""One tensor of an optimizer's state, as everyone beside the optimizer sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from colossal_core.layout import Placement


class StateTensor(NamedTuple):
    """One tensor of an optimizer's state, as a checkpoint holds it and `verify` compares it.

    kind: starts with the optimizer's name (`adamw.exp_avg`). master: whose it is, or None for what belongs to all. placement: None where
    it lies as the master does (or, where shapes differ or there is no master, is the same on every rank). store: takes back what was
    written into `tensor` where that is a copy (a quantised state is saved dequantised); None where it is the state itself.
    stored_bytes: what the state takes in memory where that is not `tensor.nbytes`.
    """

    kind: str
    master: torch.nn.Parameter | None
    tensor: torch.Tensor
    placement: Placement | None = None
    store: Callable[[], None] | None = None
    stored_bytes: int | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the state takes on this rank."""
        return self.tensor.nbytes if self.stored_bytes is None else self.stored_bytes
