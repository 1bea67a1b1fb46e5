"""In which order the reductions of a backward pass start: one order on every rank, learned in the first step.

Backward passes are told apart by the buckets that they open: all of them without a pipeline, those of one stage in a pipeline, where ranks
that reduce together run the same passes in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from colossal_zero.plan import SHARD_AXES

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

Opened = tuple[int, ...]
"""Indices of the buckets that a backward pass opens, in the plan's order."""


class ReductionOrder:
    """The order is the plan's until the first step has shown in which order the gradients of the first rank really arrive.

    late: buckets that some rank has left incomplete at the end of a backward pass. They come last.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._learned: dict[Opened, list[int]] = {}
        self._seen: dict[Opened, list[int]] | None = {}
        self._opened: Opened = ()
        self.current: Sequence[int] = ()
        self.late: set[int] = set()

    @property
    def is_learning(self) -> bool:
        return self._seen is not None

    def begin(self, opened: Sequence[int]) -> None:
        """A backward pass that opens these buckets. `current` is its order."""
        self._opened = tuple(opened)
        self.current = self._learned.get(self._opened, self._opened)
        if self._seen is not None:
            self._seen.setdefault(self._opened, [])

    def complete(self, index: int) -> None:
        """All gradients of a bucket have arrived in the running pass."""
        if self._seen is not None:
            self._seen[self._opened].append(index)

    def incomplete(self, index: int) -> None:
        """The running pass ends without some of a bucket's gradients."""
        if self._seen is not None:
            self.late.add(index)

    def agree(self) -> None:
        """At the end of the first step. Nothing later.

        Communication: once, the indices of the buckets as text, over the ranks that reduce together.
        """
        if self._seen is None:
            return
        orders = [(opened, list(dict.fromkeys([*arrived, *opened]))) for opened, arrived in self._seen.items()]
        if self._collectives.size(SHARD_AXES) > 1:
            own = json.dumps([orders, sorted(self.late)]).encode()
            found = [
                json.loads(text) for text in self._collectives.gather_bytes(own, SHARD_AXES, tag="order of gradients")
            ]
            orders = [(tuple(opened), order) for opened, order in found[0][0]]
            self.late = {index for _, late in found for index in late}
        self._learned = {opened: sorted(order, key=self.late.__contains__) for opened, order in orders}
        self._seen = None
