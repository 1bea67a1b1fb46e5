"""The one place where private names of torch are touched. Their signatures are those of torch 2.13.0 and of the sources after it, and a
test compares them with the torch at hand; they have not been run on GPUs yet.

They are what torch's own `symm_mem::fused_all_gather_matmul` and `fused_matmul_reduce_scatter` are made of. Called directly, they keep
a batch in its order in memory, where those two move the sequence in front and copy; and never take the ways that use NVLink multicast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def gather_and_consume(
    parts: Sequence[torch.Tensor], wholes: Sequence[torch.Tensor], consume: Callable[[int], None], group: str
) -> None:
    """Gathers each part [r, ...] into its whole [n r, ...] through symmetric memory, and calls `consume(rank)` for each rank's part as
    soon as it is there: this rank's own first, before it stands in the whole.
    """
    from torch.distributed import _symmetric_memory

    pipeline: Any = _symmetric_memory._pipelined_multi_all_gather_and_consume
    pipeline(list(parts), lambda shards, rank: consume(rank), list(wholes), group)


def produce_and_exchange(produce: Callable[[int, torch.Tensor], None], output: torch.Tensor, group: str) -> None:
    """output [n k, ...] <- for each rank what it has made for this one: `produce(rank, out [k, ...])` makes what goes to `rank`, and the
    next is made while the last is on its way.
    """
    from torch.distributed import _symmetric_memory

    pipeline: Any = _symmetric_memory._pipelined_produce_and_all2all
    pipeline(produce, output, group)
