"""What every package may ask of the other ranks. colossal-comm implements it over NCCL and gloo; here is its one-process form.

Groups are named by mesh axes, never by handles: `axes` is one axis name or several (flattened in the given order). `use` picks the
communicator, one for each (axes, use), so that a gather and a reduction can be on their way at the same time. `tag` names the call in
the ledger, in the debug fingerprint and in a hang report.

Two families. *Asynchronous, in place, without autograd*: `start_*`, returning a `Handle`; for gradients, parameters and states.
*Differentiable*: `all_reduce`, `replicate`, `all_gather`, `reduce_scatter`, `own_range`, `all_to_all`, `broadcast`; for activations, also
inside compiled blocks.
The gradient that arrives at a differentiable collective's output is, on each rank, either `partial` (a summand of the true one) or
`replicated` (each rank has the whole): the caller says which, because only the caller knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from colossal_core.mesh import MeshLayout

Axes = str | tuple[str, ...]
Cotangent = Literal["partial", "replicated"]
ReduceOp = Literal["sum", "max", "min"]


class Handle(Protocol):
    """A collective on its way. It keeps its tensors alive: keep it until it is waited for or, where it only sends, found done."""

    def wait(self) -> None:
        """Makes the result safe to read, and what was given safe to free, by later work on the current stream. On an accelerator it
        orders the stream and returns at once; on the CPU it blocks. Raises CommunicationError.
        """

    def is_done(self) -> bool:
        """Whether it has ended, asked without waiting. What only sends has then let its tensors go and needs no `wait`; what brings a
        result still does. One that failed is never done: its `wait` raises.
        """


@dataclass(frozen=True)
class Transfer:
    """One half of a point-to-point exchange. kind: send or receive; tensor: read or overwritten; peer: index in the group over `axes`."""

    kind: Literal["send", "receive"]
    tensor: torch.Tensor
    peer: int


class Collectives(Protocol):
    """The other ranks, as seen by one. `max` and `min` propagate NaN on every backend. Sizes are in elements."""

    mesh: MeshLayout
    rank: int
    device: torch.device

    def with_mesh(self, mesh: MeshLayout) -> Collectives:
        """The same ranks and communicators, seen through another mesh of the same size (a plan made after joining)."""

    def close(self, grace: timedelta = timedelta(0)) -> None:
        """Leaves the group. grace: how long the rank that hosts the store waits for the others. Calling it again does nothing."""

    def prepare(self, axes: Axes, use: str, *, device: torch.device | None = None) -> None:
        """Makes the communicator of (axes, use) ahead of its first use, and the links to both neighbours in the group. Every rank of the
        group calls it, in one order for all uses. device: of the tensors that this use will carry, where it is not the ranks' own.

        Needed where not all of a group take part in an exchange, and where ranks first use several communicators in different orders: to
        make one, and on NCCL a link between two ranks of it, the hosts wait for each other, so that receives posted early on both sides
        would wait for ever. Communication: on NCCL one byte to each neighbour.
        """

    def size(self, axes: Axes) -> int:
        """Number of ranks in this rank's group over `axes`. A sharing set has its size for the ranks off its stages too, and they may ask
        nothing else of it.
        """

    def index(self, axes: Axes) -> int:
        """This rank's place in its group over `axes`."""

    def start_all_reduce(
        self, tensor: torch.Tensor, axes: Axes, *, op: ReduceOp = "sum", use: str = "reduce", tag: str = ""
    ) -> Handle:
        """Reduces `tensor` in place."""

    def start_all_reduce_coalesced(
        self, tensors: Sequence[torch.Tensor], axes: Axes, *, use: str = "reduce", tag: str = ""
    ) -> Handle:
        """Sums every tensor in place, in as few messages as their dtypes allow."""

    def start_all_gather(
        self, output: torch.Tensor, tensor: torch.Tensor, axes: Axes, *, use: str = "gather", tag: str = ""
    ) -> Handle:
        """output [n * k] <- the k elements of every rank, in group order. `tensor` may be this rank's own range of `output`."""

    def start_reduce_scatter(
        self, output: torch.Tensor, tensor: torch.Tensor, axes: Axes, *, use: str = "reduce", tag: str = ""
    ) -> Handle:
        """output [k] <- this rank's range of the sum of tensor [n * k]. `output` may be this rank's own range of `tensor`."""

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
        """Sends the i-th range of tensor's dim 0 to rank i and receives in rank order; even ranges where no sizes are given."""

    def start_broadcast(self, tensor: torch.Tensor, axes: Axes, *, source: int = 0, tag: str = "") -> Handle:
        """Overwrites `tensor` with that of the rank at index `source` of the group."""

    def start_exchange(
        self, transfers: Sequence[Transfer], axes: Axes, *, use: str = "exchange", tag: str = ""
    ) -> Handle:
        """Batched point-to-point: all sends and receives together, in any order, without deadlock.

        From one rank to another, what is sent under a `use` arrives in order. On NCCL one communicator is one stream, where a receive holds
        up what this rank starts after it: exchanges that must not wait for one another (gradients against activations, one neighbour
        against the other) have uses of their own, made by `prepare`.
        """

    def all_reduce(
        self, tensor: torch.Tensor, axes: Axes, *, cotangent: Cotangent = "replicated", tag: str = ""
    ) -> torch.Tensor:
        """The sum. Backward: the gradient as it is when `replicated` (Megatron's g), summed when `partial`."""

    def replicate(self, tensor: torch.Tensor, axes: Axes, *, tag: str = "") -> torch.Tensor:
        """The tensor itself; backward sums the gradient over `axes` (Megatron's f)."""

    def all_gather(
        self, tensor: torch.Tensor, axes: Axes, *, dim: int = 0, cotangent: Cotangent = "partial", tag: str = ""
    ) -> torch.Tensor:
        """Concatenates along `dim`. Backward: reduce-scatter when `partial`, this rank's range when `replicated`."""

    def reduce_scatter(self, tensor: torch.Tensor, axes: Axes, *, dim: int = 0, tag: str = "") -> torch.Tensor:
        """This rank's range along `dim` of the sum; `dim` divides evenly. Backward: all-gather."""

    def own_range(self, tensor: torch.Tensor, axes: Axes, *, dim: int = 0, tag: str = "") -> torch.Tensor:
        """This rank's range along `dim` of a tensor that every rank has; `dim` divides evenly. Backward: all-gather."""

    def all_to_all(
        self,
        tensor: torch.Tensor,
        axes: Axes,
        *,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
        tag: str = "",
    ) -> torch.Tensor:
        """As `start_all_to_all`, along dim 0. Backward: the same with the sizes exchanged."""

    def broadcast(self, tensor: torch.Tensor, axes: Axes, *, source: int = 0, tag: str = "") -> torch.Tensor:
        """The source's tensor. Backward: the sum of all gradients at the source, zero elsewhere."""

    def gather_bytes(self, data: bytes, axes: Axes, *, tag: str = "") -> list[bytes]:
        """Every rank's bytes, in group order, on every rank. For JSON, never for pickles. Synchronises with the host."""

    def barrier(self, axes: Axes, *, tag: str = "") -> None:
        """Returns when every rank of the group has arrived."""


class DoneHandle:
    """A handle whose work is already done."""

    def wait(self) -> None:
        return None

    def is_done(self) -> bool:
        return True


class SingleProcess:
    """The collectives of one process: every group has one rank, every reduction is the tensor itself."""

    def __init__(self, device: torch.device) -> None:
        from colossal_core.mesh import MeshLayout

        self.mesh = MeshLayout()
        self.rank = 0
        self.device = device

    def with_mesh(self, mesh: MeshLayout) -> SingleProcess:
        assert mesh.world_size == 1, f"{mesh} is not a mesh of one rank"
        other = SingleProcess(self.device)
        other.mesh = mesh
        return other

    def close(self, grace: timedelta = timedelta(0)) -> None:
        del grace

    def prepare(self, axes: Axes, use: str, *, device: torch.device | None = None) -> None:
        del axes, use, device

    def size(self, axes: Axes) -> int:
        return self.mesh.size(axes)

    def index(self, axes: Axes) -> int:
        del axes
        return 0

    def start_all_reduce(
        self, tensor: torch.Tensor, axes: Axes, *, op: ReduceOp = "sum", use: str = "reduce", tag: str = ""
    ) -> Handle:
        return DoneHandle()

    def start_all_reduce_coalesced(
        self, tensors: Sequence[torch.Tensor], axes: Axes, *, use: str = "reduce", tag: str = ""
    ) -> Handle:
        return DoneHandle()

    def start_all_gather(
        self, output: torch.Tensor, tensor: torch.Tensor, axes: Axes, *, use: str = "gather", tag: str = ""
    ) -> Handle:
        return _copied(output, tensor)

    def start_reduce_scatter(
        self, output: torch.Tensor, tensor: torch.Tensor, axes: Axes, *, use: str = "reduce", tag: str = ""
    ) -> Handle:
        return _copied(output, tensor)

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
        return _copied(output, tensor)

    def start_broadcast(self, tensor: torch.Tensor, axes: Axes, *, source: int = 0, tag: str = "") -> Handle:
        return DoneHandle()

    def start_exchange(
        self, transfers: Sequence[Transfer], axes: Axes, *, use: str = "exchange", tag: str = ""
    ) -> Handle:
        sent = [transfer.tensor for transfer in transfers if transfer.kind == "send"]
        received = [transfer.tensor for transfer in transfers if transfer.kind == "receive"]
        for target, source in zip(received, sent, strict=True):
            target.copy_(source)
        return DoneHandle()

    def all_reduce(
        self, tensor: torch.Tensor, axes: Axes, *, cotangent: Cotangent = "replicated", tag: str = ""
    ) -> torch.Tensor:
        return tensor

    def replicate(self, tensor: torch.Tensor, axes: Axes, *, tag: str = "") -> torch.Tensor:
        return tensor

    def all_gather(
        self, tensor: torch.Tensor, axes: Axes, *, dim: int = 0, cotangent: Cotangent = "partial", tag: str = ""
    ) -> torch.Tensor:
        return tensor

    def reduce_scatter(self, tensor: torch.Tensor, axes: Axes, *, dim: int = 0, tag: str = "") -> torch.Tensor:
        return tensor

    def own_range(self, tensor: torch.Tensor, axes: Axes, *, dim: int = 0, tag: str = "") -> torch.Tensor:
        return tensor

    def all_to_all(
        self,
        tensor: torch.Tensor,
        axes: Axes,
        *,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
        tag: str = "",
    ) -> torch.Tensor:
        return tensor

    def broadcast(self, tensor: torch.Tensor, axes: Axes, *, source: int = 0, tag: str = "") -> torch.Tensor:
        return tensor

    def gather_bytes(self, data: bytes, axes: Axes, *, tag: str = "") -> list[bytes]:
        return [data]

    def barrier(self, axes: Axes, *, tag: str = "") -> None:
        return None


def _copied(output: torch.Tensor, tensor: torch.Tensor) -> Handle:
    if output.data_ptr() != tensor.data_ptr():
        output.copy_(tensor)
    return DoneHandle()
