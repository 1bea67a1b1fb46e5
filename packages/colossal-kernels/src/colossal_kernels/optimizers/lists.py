"""The lists of tensors that an optimizer's step takes, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from colossal_core.rounding import Kept


@dataclass(frozen=True)
class Lists:
    """Tensors item by item: parameters, raw gradients, up to two moments, and copies where there are some."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    moments: Sequence[Sequence[Kept]] = ()
    copies: Sequence[Tensor] | None = None

    def where(self, indices: Sequence[int]) -> Lists:
        """Some of the items."""

        def some(values: Sequence[Any]) -> list[Any]:
            return [values[index] for index in indices]

        copies = None if self.copies is None else some(self.copies)
        return Lists(some(self.params), some(self.grads), [some(moment) for moment in self.moments], copies)

    def item(self, index: int) -> list[Kept]:
        copies = () if self.copies is None else (self.copies,)
        return [found[index] for found in (self.params, self.grads, *self.moments, *copies)]
