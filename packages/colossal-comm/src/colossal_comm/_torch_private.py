"""The one place where names of torch that are private or differ between versions are touched. Tried on torch 2.13.0 (CPU, gloo).

- `all_gather_single` and `reduce_scatter_single` (torch 2.13) replace `all_gather_into_tensor` and `reduce_scatter_tensor`, which now
  emit FutureWarning.
- `_new_process_group_helper`: the public `new_group(use_local_synchronization=True)` names a group by the number of groups that this
  rank has made so far, so ranks that belong to different numbers of groups wait for each other under different names for ever. Here the
  name is given. It also sorts the ranks (before 2.13 always); here their order is kept.
- `group_name`, by which torch's operators on symmetric memory find a group, and the variable that turns multicast off in them.
- The stores, whose public names in `torch.distributed` its type annotations do not export.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore
from torch.distributed import distributed_c10d as c10d

__all__ = [
    "FileStore",
    "PrefixStore",
    "Store",
    "TCPStore",
    "all_gather_single",
    "new_named_group",
    "reduce_scatter_single",
    "registered_name",
    "turn_multicast_off",
]


def all_gather_single(output: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Starts an all-gather into one tensor."""
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return cast(dist.Work, function(output, tensor, group=group, async_op=True))


def reduce_scatter_single(output: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Starts a summing reduce-scatter from one tensor."""
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return cast(dist.Work, function(output, tensor, group=group, async_op=True))


def new_named_group(
    ranks: Sequence[int], index: int, name: str, store: Store, timeout: timedelta, device: torch.device
) -> dist.ProcessGroup:
    """Makes a process group among `ranks`, in this order; only they call it. Blocks until all have.

    On an accelerator the communicator is connected at once (`device_id`), so that the first point-to-point exchange may involve two
    ranks only. For tensors of the CPU it is gloo's, whatever the others are.
    """
    helper: Any = c10d._new_process_group_helper
    world: Any = c10d._world
    backend = "gloo" if device.type == "cpu" else dist.get_backend()
    device_id = None if device.type == "cpu" else device
    group, _ = helper(
        len(ranks),
        index,
        list(ranks),
        c10d.Backend(backend),
        store,
        name,
        timeout=timeout,
        device_id=device_id,
        group_desc=name,
    )
    world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    return cast(dist.ProcessGroup, group)


def registered_name(group: dist.ProcessGroup) -> str:
    """The name under which torch's own operators find a group of this process."""
    return str(group.group_name)


def turn_multicast_off() -> None:
    """Keeps symmetric memory from making multicast objects of NVSwitch in this process; torch asks when it allocates for the first time."""
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
