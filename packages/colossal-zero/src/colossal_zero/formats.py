"""What is kept of each bucket in which dtype, and the memory of the masters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from colossal_core.layout import ParameterLayout
from colossal_zero.plan import SHARD_AXES, BucketShape, bucket_shape

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.precision import Precision


@dataclass(frozen=True)
class Formats:
    """What is kept how. stage: 0 to 3. compute, master, gradient: dtypes of the three buffers; wire: dtype in which gradients are sent.
    whole_gradients: they are added up whole, and reduced once a step; else each time, and a shard is kept.
    """

    stage: int
    compute: torch.dtype
    master: torch.dtype
    gradient: torch.dtype
    wire: torch.dtype
    whole_gradients: bool

    @staticmethod
    def of(stage: int, precision: Precision, wire: torch.dtype | None, *, whole_gradients: bool) -> Formats:
        sent = wire or precision.gradient
        return Formats(stage, precision.compute, precision.master, precision.gradient, sent, whole_gradients)

    def master_of(self, *, trainable: bool) -> torch.dtype:
        """In which a bucket's masters are kept: frozen ones as they are computed with."""
        return self.master if trainable else self.compute

    def shares(self, *, trainable: bool) -> bool:
        """Whether masters lie in the compute copy."""
        return self.stage < 3 and self.master_of(trainable=trainable) == self.compute

    def kept(self, shape: BucketShape) -> int:
        """Elements of a bucket's masters on one rank."""
        return shape.shard_length if self.stage else shape.length


def shape_of(layouts: Sequence[ParameterLayout], collectives: Collectives) -> BucketShape:
    """The flat buffer of a bucket on this rank."""
    coordinate = collectives.mesh.coordinate(collectives.rank)
    shapes = [layout.compute.local_shape(coordinate, collectives.mesh) for layout in layouts]
    return bucket_shape([math.prod(shape) for shape in shapes], collectives.size(SHARD_AXES))


def allocate_masters(
    buckets: Sequence[Sequence[ParameterLayout]], formats: Formats, collectives: Collectives
) -> list[torch.Tensor | None]:
    """Zeros for the masters of each bucket: one allocation for all trained ones, and one for all frozen ones. None: they lie in the compute
    copy.

    CUDA's allocator rounds large allocations up to 2 MiB: apart, the 48 blocks of GPT-2 1.5B would take 33 MiB more on each of four GPUs.
    (Gradients stay apart: they come bucket by bucket while the backward pass frees activations, and all of them at its begin would
    raise the peak.)
    """
    found: list[torch.Tensor | None] = [None] * len(buckets)
    for trainable in (True, False):
        if formats.shares(trainable=trainable):
            continue
        indices = [index for index, layouts in enumerate(buckets) if layouts[0].trainable is trainable]
        sizes = [formats.kept(shape_of(buckets[index], collectives)) for index in indices]
        flat = torch.zeros(sum(sizes), dtype=formats.master_of(trainable=trainable), device=collectives.device)
        for index, size, stop in zip(indices, sizes, itertools.accumulate(sizes), strict=True):
            found[index] = flat[stop - size : stop]
    return found
