"""How bytes move: the seam between `RankCollectives` (checks, ledger, debug mode, autograd) and whoever carries them out.

Two transports are here: `TorchTransport` (process groups of torch.distributed, `groups.py`) and `SimulatedTransport` (threads of one
process, `simulated.py`). Both see groups that are already resolved, sizes above 1, contiguous tensors and checked arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from colossal_core.collectives import Handle, ReduceOp, Transfer


@dataclass(frozen=True)
class Group:
    """The ranks that one communicator joins. ranks: in group order; index: this rank's place; axes: for reports, not for identity."""

    axes: tuple[str, ...]
    use: str
    ranks: tuple[int, ...]
    index: int

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def communicator(self) -> tuple[tuple[int, ...], str]:
        """What decides the communicator: axes that span the same ranks (`dp` and `dp_shard` without replication) share it."""
        return self.ranks, self.use

    @property
    def name(self) -> str:
        """The communicator's name, the same on all its members, however many groups each of them has made before."""
        return f"colossal.{self.use}.{'_'.join(str(rank) for rank in self.ranks)}"


@dataclass(frozen=True)
class Call:
    """One collective call, as it stands in reports and fingerprints.

    sequence: counts the calls on the same communicator, from 0. shape: of the tensor that decides the message (several are joined into
    one text). detail: what else all ranks must agree on (the reduction, the source); of an exchange, what this rank sends and receives
    (`in_words`). sizes: rows sent to and received from each rank, where those may differ.
    """

    operation: str
    group: Group
    sequence: int
    shape: str
    dtype: str
    tag: str
    detail: str = ""
    sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __str__(self) -> str:
        tag = f", tag {self.tag!r}" if self.tag else ""
        transfers = f"; {self.detail}" if self.operation == "exchange" else ""
        return f"{self.operation} #{self.sequence} over {', '.join(self.group.axes)} (use {self.group.use!r}{tag}{transfers})"


def in_words(transfers: Sequence[Transfer], group: Group) -> str:
    """What a rank's half of an exchange is: `rank 1 receives float32 (4, 8) from rank 0 and sends float32 (2,) to rank 2`. Several
    transfers with one peer in one direction stand together.
    """
    tensors: dict[tuple[str, int], list[str]] = {}
    for transfer in transfers:
        kind = f"{str(transfer.tensor.dtype).removeprefix('torch.')} {tuple(transfer.tensor.shape)}"
        tensors.setdefault((transfer.kind, group.ranks[transfer.peer]), []).append(kind)
    links = [
        f"{kind}s {', '.join(kinds)} {'to' if kind == 'send' else 'from'} rank {peer}"
        for (kind, peer), kinds in tensors.items()
    ]
    return f"rank {group.ranks[group.index]} {' and '.join(links)}"


class Transport(Protocol):
    """Carries collectives out. Every method returns at once; the handle's `wait` raises RuntimeError when the operation failed."""

    def prepare(self, group: Group, device: torch.device) -> None:
        """Makes the group's communicator for tensors on `device` now, and its links between neighbours. Every member calls it; otherwise
        the first collective makes the communicator, and the first message a link.
        """

    def all_reduce(self, group: Group, tensor: torch.Tensor, op: ReduceOp) -> Handle: ...

    def all_gather(self, group: Group, output: torch.Tensor, tensor: torch.Tensor) -> Handle: ...

    def reduce_scatter(self, group: Group, output: torch.Tensor, tensor: torch.Tensor) -> Handle: ...

    def all_to_all(
        self,
        group: Group,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
    ) -> Handle: ...

    def broadcast(self, group: Group, tensor: torch.Tensor, source: int) -> Handle: ...

    def exchange(self, group: Group, transfers: Sequence[Transfer], tag: str) -> Handle:
        """tag: for reports."""

    def symmetric_group(self, group: Group) -> str:
        """The group's name for torch's operators on symmetric memory, or "" where this rank has none."""

    def close(self, grace_seconds: float) -> None:
        """Frees everything; waits at most `grace_seconds` for the others to be done with what this rank hosts."""
