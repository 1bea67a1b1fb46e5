"""Carrying new masters into the compute copies, while the optimizer still updates others."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from colossal_zero.flat_bucket import FlatBucket


class Publication:
    """Refreshes each bucket once a step, in the order of `buckets`: that in which the next forward pass asks for them.

    The order is one on every rank, whatever the order of the optimizer: a bucket whose masters are all new waits for those before it.
    """

    def __init__(self, buckets: Sequence[FlatBucket]) -> None:
        self._buckets = tuple(buckets)
        self.begin()

    def begin(self) -> None:
        """Every master is to be updated, and no bucket counts as refreshed: masters may be about to change in whatever way."""
        self._left = deque(self._buckets)
        self._outdated = {
            id(shard.master): bucket.index for bucket in self._buckets if bucket.trainable for shard in bucket.shards
        }
        self._uncopied = dict(self._outdated)

    def copied(self, masters: Sequence[nn.Parameter]) -> None:
        """The optimizer writes the new values of these masters into the compute copies itself, before it calls `updated`."""
        for master in masters:
            self._uncopied.pop(id(master), None)

    @property
    def refreshed(self) -> Sequence[FlatBucket]:
        """Those whose compute copies hold what their masters hold since `begin`."""
        return self._buckets[: len(self._buckets) - len(self._left)]

    def updated(self, masters: Sequence[nn.Parameter]) -> None:
        """These masters have their new values."""
        for master in masters:
            self._outdated.pop(id(master), None)
        incomplete = set(self._outdated.values())
        while self._left and self._left[0].index not in incomplete:
            self._refresh(self._left.popleft())

    def finish(self) -> None:
        """Refreshes what is left: of optimizers that say nothing until they are done, everything."""
        for bucket in self._left:
            self._refresh(bucket)
        self.begin()

    @torch.no_grad()
    def _refresh(self, bucket: FlatBucket) -> None:
        bucket.refresh(copied=bucket.trainable and bucket.index not in self._uncopied.values())
