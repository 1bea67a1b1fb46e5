"""`RankCollectives`: core's `Collectives` over a transport, with its checks, ledger, debug mode and autograd.

A group of one rank costs nothing: no communicator, no operation, no count. Communicators belong to (ranks, use): asynchronous
reductions, gathers, all-to-alls and exchanges have one each, so that they overlap, and the caller may name more; differentiable
collectives run on use `compute`, and broadcasts, barriers and byte gathers on `control`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from colossal_comm import differentiable, peers, staging
from colossal_comm.handle import AllOf, prepared, started
from colossal_comm.ledger import ring_bytes
from colossal_comm.transport import Call, Group, Transport, in_words
from colossal_core.collectives import DoneHandle

if TYPE_CHECKING:
    from colossal_comm.session import Session
    from colossal_core.collectives import Axes, Cotangent, Handle, ReduceOp, Transfer
    from colossal_core.mesh import MeshLayout


class RankCollectives:
    """The other ranks of a mesh, as seen by one. Made by `join` and by `run_simulated`."""

    def __init__(self, mesh: MeshLayout, rank: int, device: torch.device, session: Session) -> None:
        self.mesh = mesh
        self.rank = rank
        self.device = device
        self.ledger = session.ledger
        self._session = session
        self._groups: dict[tuple[Axes, str], Group] = {}
        # A plain table, because Dynamo traces `size` in every compiled block.
        self._sizes: dict[str, int] = {axis: mesh.size(axis) for axis in mesh.axis_names}
        self._key = differentiable.register(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of a model sees the same ranks."""
        del memo
        return self

    def with_mesh(self, mesh: MeshLayout) -> RankCollectives:
        """The same ranks, communicators and ledger, seen through another mesh of the same size (a plan made after joining)."""
        assert mesh.world_size == self.mesh.world_size, f"{mesh} is not a mesh of {self.mesh.world_size} ranks"
        return RankCollectives(mesh, self.rank, self.device, self._session)

    def prepare(self, axes: Axes, use: str, *, device: torch.device | None = None) -> None:
        """Makes a communicator ahead of its first use; every rank of the group calls it. A rank of its own (`silent_rank`) makes none.
        device: of the tensors that this use will carry, where it is not this rank's own: `cpu` beside a GPU.
        """
        if self.size(axes) == 1:
            return
        group, transport = self._group(axes, use), self._session.transport
        if transport is not None:
            prepared(group, transport, device or self.device)

    def close(self, grace: timedelta = timedelta(0)) -> None:
        """As `colossal_comm.leave`."""
        if self._session.transport is not None:
            self._session.transport.close(grace.total_seconds())

    def symmetric_group(self, axes: Axes) -> str:
        """The name by which torch's operators on symmetric memory (`torch.ops.symm_mem`) find this rank's group over `axes`; "" where they
        cannot work: one rank, a CPU, simulated ranks, ranks on several machines, GPUs that do not reach one another's memory.

        It is the communicator of use `compute`. Every rank of the group calls it at the same point of the program, and all get a name or
        none does. NVLink multicast is off in this process afterwards. What those operators send is told by `announce`.
        Communication: one gather of some hundred bytes a rank. Not in core's protocol: only a plugin that knows torch's operators asks.
        """
        if self.size(axes) == 1 or self.device.type != "cuda":
            return ""
        facts = self.gather_bytes(peers.own_facts(self.device), axes, tag="symmetric memory")
        return self._transport().symmetric_group(self._group(axes, "compute")) if peers.reach_each_other(facts) else ""

    def announce(
        self,
        operation: Literal["all_gather", "reduce_scatter"],
        part: torch.Tensor,
        axes: Axes,
        *,
        tag: str = "",
    ) -> None:
        """Says that the caller now carries out a collective by itself, over `symmetric_group(axes)`: debug mode compares it between ranks,
        and the ledger counts it. part: what this rank gives to an all-gather, or what it gets from a reduce-scatter.
        """
        size = self.size(axes)
        if size == 1 or part.numel() == 0:
            return
        call = self._call(operation, self._group(axes, "compute"), part, tag, "symmetric memory")
        if self._session.guard is not None:
            self._session.guard.check(call)
        self.ledger.record(call.group.axes, operation, tag, ring_bytes(operation, size, size * part.nbytes))

    def size(self, axes: Axes) -> int:
        if isinstance(axes, str):
            return self._sizes[axes]
        product = 1
        for axis in axes:
            product *= self._sizes[axis]
        return product

    def index(self, axes: Axes) -> int:
        return 0 if self.size(axes) == 1 else self._group(axes, "compute").index

    def _group(self, axes: Axes, use: str) -> Group:
        found = self._groups.get((axes, use))
        if found is None:
            names = (axes,) if isinstance(axes, str) else tuple(axes)
            ranks = self.mesh.group(self.rank, names)
            found = self._groups[axes, use] = Group(names, use, ranks, ranks.index(self.rank))
        return found

    def _transport(self) -> Transport:
        assert self._session.transport is not None, "a mesh of one rank has no group above size 1"
        return self._session.transport

    def _call(self, operation: str, group: Group, tensor: torch.Tensor, tag: str, detail: str = "") -> Call:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Call(operation, group, self._session.next_sequence(group), str(tuple(tensor.shape)), dtype, tag, detail)

    def _start(
        self, call: Call, sent_bytes: int, issue: Callable[[], Handle], finish: Callable[[], None] | None = None
    ) -> Handle:
        guard = self._session.guard
        if guard is not None:
            guard.check(call)
        self.ledger.record(call.group.axes, call.operation, call.tag, sent_bytes)
        return started(call, issue, finish)

    def start_all_reduce(
        self, tensor: torch.Tensor, axes: Axes, *, op: ReduceOp = "sum", use: str = "reduce", tag: str = ""
    ) -> Handle:
        if self.size(axes) == 1 or tensor.numel() == 0:
            return DoneHandle()
        group, transport = self._group(axes, use), self._transport()
        staged = staging.for_reduction(tensor, op)
        call = self._call("all_reduce", group, tensor, tag, op)
        sent = ring_bytes("all_reduce", group.size, tensor.nbytes)
        return self._start(call, sent, lambda: transport.all_reduce(group, staged.buffer, op), staged.finish)

    def start_all_reduce_coalesced(
        self, tensors: Sequence[torch.Tensor], axes: Axes, *, use: str = "reduce", tag: str = ""
    ) -> Handle:
        if self.size(axes) == 1:
            return DoneHandle()
        group, transport = self._group(axes, use), self._transport()
        handles: list[Handle] = []
        for staged in staging.flattened(tensors):
            call = self._call("all_reduce", group, staged.buffer, tag, "sum")
            sent = ring_bytes("all_reduce", group.size, staged.buffer.nbytes)
            handles.append(self._start(call, sent, _all_reduce_of(transport, group, staged.buffer), staged.finish))
        return AllOf(handles)

    def start_all_gather(
        self, output: torch.Tensor, tensor: torch.Tensor, axes: Axes, *, use: str = "gather", tag: str = ""
    ) -> Handle:
        size = self.size(axes)
        assert output.numel() == size * tensor.numel(), (
            f"{tuple(output.shape)} is not {size} times {tuple(tensor.shape)}"
        )
        if size == 1 or output.numel() == 0:
            return _copied(output, tensor)
        group, transport = self._group(axes, use), self._transport()
        source, target = tensor.contiguous(), staging.for_output(output)
        call = self._call("all_gather", group, tensor, tag)
        sent = ring_bytes("all_gather", size, output.nbytes)
        return self._start(call, sent, lambda: transport.all_gather(group, target.buffer, source), target.finish)

    def start_reduce_scatter(
        self, output: torch.Tensor, tensor: torch.Tensor, axes: Axes, *, use: str = "reduce", tag: str = ""
    ) -> Handle:
        size = self.size(axes)
        assert tensor.numel() == size * output.numel(), (
            f"{tuple(tensor.shape)} is not {size} times {tuple(output.shape)}"
        )
        if size == 1 or output.numel() == 0:
            return _copied(output, tensor)
        group, transport = self._group(axes, use), self._transport()
        source, target = tensor.contiguous(), staging.for_output(output)
        call = self._call("reduce_scatter", group, tensor, tag)
        sent = ring_bytes("reduce_scatter", size, tensor.nbytes)
        return self._start(call, sent, lambda: transport.reduce_scatter(group, target.buffer, source), target.finish)

    def start_all_to_all(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        axes: Axes,
        *,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
        tag: str = "",
    ) -> Handle:
        return self.all_to_all_on(output, tensor, axes, output_sizes, input_sizes, "all_to_all", tag)

    def all_to_all_on(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        axes: Axes,
        output_sizes: Sequence[int] | None,
        input_sizes: Sequence[int] | None,
        use: str,
        tag: str,
    ) -> Handle:
        """`start_all_to_all` on the communicator of a given use."""
        size = self.size(axes)
        received, sent = _ranges(output, output_sizes, size), _ranges(tensor, input_sizes, size)
        if size == 1:
            return _copied(output, tensor)
        group, transport = self._group(axes, use), self._transport()
        source, target = tensor.contiguous(), staging.for_output(output)
        dtype, row = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:])
        sequence = self._session.next_sequence(group)
        call = Call("all_to_all", group, sequence, f"rows of {row}", dtype, tag, sizes=(sent, received))
        row_bytes = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
        sent_bytes = row_bytes * (sum(sent) - sent[group.index])
        return self._start(
            call,
            sent_bytes,
            lambda: transport.all_to_all(group, target.buffer, source, received, sent),
            target.finish,
        )

    def start_broadcast(self, tensor: torch.Tensor, axes: Axes, *, source: int = 0, tag: str = "") -> Handle:
        return self.broadcast_on(tensor, axes, source, "control", tag)

    def broadcast_on(self, tensor: torch.Tensor, axes: Axes, source: int, use: str, tag: str) -> Handle:
        """`start_broadcast` on the communicator of a given use."""
        size = self.size(axes)
        assert 0 <= source < size, f"source {source} of {size}"
        if size == 1 or tensor.numel() == 0:
            return DoneHandle()
        group, transport = self._group(axes, use), self._transport()
        staged = staging.in_place(tensor)
        call = self._call("broadcast", group, tensor, tag, f"source {source}")
        sent = ring_bytes("broadcast", size, tensor.nbytes)
        return self._start(call, sent, lambda: transport.broadcast(group, staged.buffer, source), staged.finish)

    def start_exchange(
        self, transfers: Sequence[Transfer], axes: Axes, *, use: str = "exchange", tag: str = ""
    ) -> Handle:
        own = self.index(axes)
        local, remote = staging.split_own(transfers, own)
        staging.hand_over(local)
        if not remote:
            return DoneHandle()
        group, transport, guard = self._group(axes, use), self._transport(), self._session.guard
        staged, finish = staging.for_exchange(remote)
        call = self._call("exchange", group, remote[0].tensor, tag, in_words(remote, group))
        sent = sum(transfer.tensor.nbytes for transfer in remote if transfer.kind == "send")
        self.ledger.record(group.axes, "exchange", tag, sent)

        def issue() -> Handle:
            if guard is None:
                return transport.exchange(group, staged, tag)
            # Making it needs both sides, and a guarded receive starts late.
            transport.prepare(group, staged[0].tensor.device)
            return guard.exchange(call, staged, lambda part: transport.exchange(group, part, tag))

        return started(call, issue, finish)

    def all_reduce(
        self, tensor: torch.Tensor, axes: Axes, *, cotangent: Cotangent = "replicated", tag: str = ""
    ) -> torch.Tensor:
        if self.size(axes) == 1:
            return tensor
        return differentiable.all_reduce(tensor, self._key, axes, cotangent, tag)

    def replicate(self, tensor: torch.Tensor, axes: Axes, *, tag: str = "") -> torch.Tensor:
        if self.size(axes) == 1:
            return tensor
        return differentiable.replicate(tensor, self._key, axes, tag)

    def all_gather(
        self, tensor: torch.Tensor, axes: Axes, *, dim: int = 0, cotangent: Cotangent = "partial", tag: str = ""
    ) -> torch.Tensor:
        if self.size(axes) == 1:
            return tensor
        return differentiable.all_gather(tensor, self._key, axes, dim, cotangent, tag)

    def reduce_scatter(self, tensor: torch.Tensor, axes: Axes, *, dim: int = 0, tag: str = "") -> torch.Tensor:
        size = self.size(axes)
        if size == 1:
            return tensor
        assert tensor.shape[dim] % size == 0, f"dim {dim} of {tuple(tensor.shape)} does not divide by {size}"
        return differentiable.reduce_scatter(tensor, self._key, axes, dim, size, tag)

    def own_range(self, tensor: torch.Tensor, axes: Axes, *, dim: int = 0, tag: str = "") -> torch.Tensor:
        size = self.size(axes)
        if size == 1:
            return tensor
        assert tensor.shape[dim] % size == 0, f"dim {dim} of {tuple(tensor.shape)} does not divide by {size}"
        return differentiable.own_range(tensor, self._key, axes, dim, size, tag)

    def all_to_all(
        self,
        tensor: torch.Tensor,
        axes: Axes,
        *,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
        tag: str = "",
    ) -> torch.Tensor:
        if self.size(axes) == 1:
            return tensor
        return differentiable.all_to_all(tensor, self._key, axes, output_sizes, input_sizes, tag)

    def broadcast(self, tensor: torch.Tensor, axes: Axes, *, source: int = 0, tag: str = "") -> torch.Tensor:
        if self.size(axes) == 1:
            return tensor
        return differentiable.broadcast(tensor, self._key, axes, source, tag)

    def gather_bytes(self, data: bytes, axes: Axes, *, tag: str = "") -> list[bytes]:
        size = self.size(axes)
        if size == 1:
            return [data]
        lengths = torch.empty(size, dtype=torch.int64, device=self.device)
        own = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        self.start_all_gather(lengths, own, axes, use="control", tag=tag).wait()
        counts: list[int] = lengths.tolist()
        longest = max(counts)
        if longest == 0:
            return [b""] * size
        padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8).to(self.device)
        gathered = torch.empty(size * longest, dtype=torch.uint8, device=self.device)
        self.start_all_gather(gathered, padded, axes, use="control", tag=tag).wait()
        rows = gathered.view(size, longest).cpu()
        return [rows[place, :count].numpy().tobytes() for place, count in enumerate(counts)]

    def barrier(self, axes: Axes, *, tag: str = "") -> None:
        if self.size(axes) == 1:
            return
        token = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.start_all_reduce(token, axes, use="control", tag=tag).wait()
        token.item()  # on an accelerator `wait` only orders streams; reading waits for the device


def _all_reduce_of(transport: Transport, group: Group, buffer: torch.Tensor) -> Callable[[], Handle]:
    return lambda: transport.all_reduce(group, buffer, "sum")


def _copied(output: torch.Tensor, tensor: torch.Tensor) -> Handle:
    if output.numel() and output.data_ptr() != tensor.data_ptr():
        output.copy_(tensor.reshape(output.shape))
    return DoneHandle()


def _ranges(tensor: torch.Tensor, sizes: Sequence[int] | None, num_ranks: int) -> tuple[int, ...]:
    rows = tensor.shape[0]
    if sizes is None:
        assert rows % num_ranks == 0, f"{rows} rows do not divide among {num_ranks} ranks: give sizes"
        return (rows // num_ranks,) * num_ranks
    assert len(sizes) == num_ranks and sum(sizes) == rows, f"sizes {list(sizes)} for {rows} rows and {num_ranks} ranks"
    return tuple(sizes)
