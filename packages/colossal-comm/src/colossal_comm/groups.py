"""One process group of torch.distributed for each (ranks, use), made when first used, and the collectives on it.

Groups are made by their members alone, under a name that depends on the members and the use only, so ranks outside are not disturbed
and need not keep the same order of creation. Within a group every member must make its first call at the same point of the program
(all do, since they run the same collectives); `prepare` does it ahead of time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from colossal_comm import _torch_private
from colossal_comm.handle import PolledWork
from colossal_core.collectives import Transfer

if TYPE_CHECKING:
    from colossal_comm._torch_private import Store
    from colossal_comm.transport import Group
    from colossal_core.collectives import Handle, ReduceOp

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_LEAVING, _LEFT = "colossal/leaving", "colossal/left"


class WorkHandle:
    """Several works of torch.distributed as one handle. Keeps their tensors alive until they are waited for or found done. On NCCL `wait`
    makes the current stream wait, not the host: memory that is then let go is used again by work on that stream, which comes after.
    """

    def __init__(
        self, works: Sequence[dist.Work | None], tensors: Sequence[torch.Tensor], on_failure: Callable[[], None]
    ) -> None:
        self._works = [work for work in works if work is not None]
        self._tensors = tuple(tensors)
        self._on_failure = on_failure

    def wait(self) -> None:
        try:
            for work in self._works:
                work.wait()
        except RuntimeError:
            self._on_failure()
            raise
        self._works, self._tensors = [], ()

    def is_done(self) -> bool:
        if not all(work.is_completed() for work in self._works):
            return False
        try:
            # Nothing is left to wait for, but torch holds the tensors too until then, and says only then that the work failed.
            self.wait()
        except RuntimeError:
            return False
        return True


class TorchTransport:
    """Collectives over torch.distributed. store: shared by all ranks; rank 0 may host it."""

    def __init__(self, store: Store, rank: int, world_size: int, device: torch.device, timeout: timedelta) -> None:
        self.store = store
        self._hosts, self._world_size = rank == 0, world_size
        self._device, self._timeout = device, timeout
        self._groups: dict[tuple[tuple[int, ...], str], dist.ProcessGroup] = {}
        self._closed = False
        self._failed = False

    def prepare(self, group: Group, device: torch.device) -> None:
        is_new = group.communicator not in self._groups
        self._process_group(group, device)
        if is_new and device.type != "cpu":
            self._link_neighbours(group)

    def _link_neighbours(self, group: Group) -> None:
        """Sends a byte to the ranks before and after this one (in a ring) and receives one. In its first message with a rank NCCL exchanges
        addresses through the host, which waits for that rank to do the same; gloo has linked all ranks of a group when it is made.
        """
        neighbours = sorted({(group.index + step) % group.size for step in (-1, 1)})
        sent = torch.zeros(1, dtype=torch.uint8, device=self._device)
        halves = [Transfer("send", sent, peer) for peer in neighbours]
        halves += [Transfer("receive", torch.empty_like(sent), peer) for peer in neighbours]
        self.exchange(group, halves, "links").wait()

    def _process_group(self, group: Group, device: torch.device | None = None) -> dist.ProcessGroup:
        """device: of the tensors; a use carries those of one device."""
        if self._closed:
            raise RuntimeError("this rank has left the group (colossal_comm.leave was called)")
        found = self._groups.get(group.communicator)
        if found is None:
            try:
                found = _torch_private.new_named_group(
                    group.ranks, group.index, group.name, self.store, self._timeout, device or self._device
                )
            except RuntimeError:
                self._mark_failed()
                raise
            self._groups[group.communicator] = found
        return found

    def all_reduce(self, group: Group, tensor: torch.Tensor, op: ReduceOp) -> Handle:
        work = dist.all_reduce(tensor, op=_OPS[op], group=self._process_group(group), async_op=True)
        return WorkHandle([work], [tensor], self._mark_failed)

    def all_gather(self, group: Group, output: torch.Tensor, tensor: torch.Tensor) -> Handle:
        work = _torch_private.all_gather_single(output.view(-1), tensor.view(-1), self._process_group(group))
        return WorkHandle([work], [output, tensor], self._mark_failed)

    def reduce_scatter(self, group: Group, output: torch.Tensor, tensor: torch.Tensor) -> Handle:
        work = _torch_private.reduce_scatter_single(output.view(-1), tensor.view(-1), self._process_group(group))
        return WorkHandle([work], [output, tensor], self._mark_failed)

    def all_to_all(
        self,
        group: Group,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
    ) -> Handle:
        work = dist.all_to_all_single(
            output, tensor, list(output_sizes), list(input_sizes), group=self._process_group(group), async_op=True
        )
        return WorkHandle([work], [output, tensor], self._mark_failed)

    def broadcast(self, group: Group, tensor: torch.Tensor, source: int) -> Handle:
        work = dist.broadcast(tensor, src=group.ranks[source], group=self._process_group(group), async_op=True)
        return WorkHandle([work], [tensor], self._mark_failed)

    def exchange(self, group: Group, transfers: Sequence[Transfer], tag: str) -> Handle:
        del tag
        device = transfers[0].tensor.device
        process_group = self._process_group(group, device)
        operations = [
            dist.P2POp(
                dist.isend if transfer.kind == "send" else dist.irecv,
                transfer.tensor,
                group=process_group,
                group_peer=transfer.peer,
            )
            for transfer in transfers
        ]
        tensors = [transfer.tensor for transfer in transfers]
        handle = WorkHandle(dist.batch_isend_irecv(operations), tensors, self._mark_failed)
        return PolledWork(handle) if device.type == "cpu" else handle

    def symmetric_group(self, group: Group) -> str:
        if self._device.type != "cuda":
            return ""
        _torch_private.turn_multicast_off()
        return _torch_private.registered_name(self._process_group(group))

    def close(self, grace_seconds: float) -> None:
        if self._closed:
            return
        self._closed = True
        self._groups.clear()
        deadline = time.monotonic() + (0.0 if self._failed else grace_seconds)
        # A rank that leaves at once would break gloo's handshake with one that is still joining.
        self._count(_LEAVING, self._world_size, deadline)
        dist.destroy_process_group()
        # The store may live in rank 0, which therefore goes last: the others say here that they ask it nothing more.
        self._count(_LEFT, self._world_size if self._hosts else 0, deadline)
        del self.store

    def _count(self, key: str, wanted: int, deadline: float) -> None:
        """Adds this rank to a counter of the store and waits until it stands at `wanted`, or for the deadline. After it the store is not
        asked: the process that hosts it may have gone, and torch would tell of that at length.
        """
        if time.monotonic() >= deadline:
            return
        pause = 0.001
        try:
            arrived = self.store.add(key, 1)
            while arrived < wanted and time.monotonic() < deadline:
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
                # add(key, 0) reads the counter without blocking on a key that is not there yet.
                arrived = self.store.add(key, 0)
        except RuntimeError:
            return  # the process that hosts the store has failed

    def _mark_failed(self) -> None:
        self._failed = True
