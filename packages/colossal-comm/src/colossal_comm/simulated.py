"""Ranks as threads of one process: for tests and for proving sharding rules before a weight is moved. No port, no file, no process.

A collective is a meeting: each rank leaves copies of what it gives and reads everybody's when it waits. Sums run in rank order, in
the tensor's own dtype, so every rank gets the same bits and every run too. Ranks that call different collectives are told so at
once, and so are ranks that wait for one that has finished. What is shared by threads is shared by these ranks: torch's global random
generator above all, so give each rank its own `torch.Generator`. Autograd on the CPU runs the backward pass in the thread that asks
for it, so differentiable collectives meet in the backward pass as they do between processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch

from colossal_comm.collectives import RankCollectives
from colossal_comm.ledger import Ledger
from colossal_comm.session import Session
from colossal_core.errors import CommunicationError

if TYPE_CHECKING:
    from colossal_comm.transport import Group
    from colossal_core.collectives import Collectives, Handle, ReduceOp, Transfer
    from colossal_core.mesh import MeshLayout

T = TypeVar("T")

_REDUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


class _Stopped(BaseException):
    """Ends a rank because another one has failed; never seen by the caller, nor caught by `except Exception` in a rank."""


@dataclass
class _Meeting:
    """One collective of one group. what: each rank's call; given: each rank's copies; read: how many ranks are done with it."""

    what: dict[int, str] = field(default_factory=dict)
    given: dict[int, torch.Tensor] = field(default_factory=dict)
    sizes: dict[int, Sequence[int]] = field(default_factory=dict)
    read: int = 0


_Box = tuple[str, int, int, int]
"""Where a letter lies: communicator, sender, receiver, and its number between the two."""


class _World:
    """What the threads share, under one lock."""

    def __init__(self, num_ranks: int, timeout_seconds: float) -> None:
        self.changed = threading.Condition()
        self.num_ranks = num_ranks
        self.timeout_seconds = timeout_seconds
        self.failed: BaseException | None = None
        self.finished: set[int] = set()
        self.meetings: dict[tuple[tuple[int, ...], str, int], _Meeting] = {}
        self.letters: dict[_Box, torch.Tensor] = {}

    def fail(self, error: BaseException) -> None:
        with self.changed:
            if self.failed is None:
                self.failed = error
            self.changed.notify_all()

    def finish(self, rank: int) -> None:
        with self.changed:
            self.finished.add(rank)
            self.changed.notify_all()

    def wait_until(self, ready: Callable[[], bool], missing: Callable[[], list[int]], what: str) -> None:
        """Waits under the lock. missing: the ranks that are still waited for."""

        def over() -> bool:
            return self.failed is not None or ready() or any(rank in self.finished for rank in missing())

        in_time = self.changed.wait_for(over, self.timeout_seconds)
        if self.failed is not None:
            raise _Stopped
        if ready():
            return
        gone = [rank for rank in missing() if rank in self.finished] if in_time else missing()
        names = "{" + ", ".join(str(rank) for rank in gone) + "}"
        why = "before their function ended" if in_time else f"within {self.timeout_seconds:g} s"
        raise CommunicationError(f"ranks {names} never reached {what} {why}")


class _MeetingHandle:
    """Reads a meeting once everybody is there."""

    def __init__(self, world: _World, key: tuple[tuple[int, ...], str, int], read: Callable[[_Meeting], None]) -> None:
        self._world, self._key, self._read = world, key, read

    def wait(self) -> None:
        world, (ranks, use, number) = self._world, self._key
        with world.changed:
            meeting = world.meetings[self._key]
            what = f"{next(iter(meeting.what.values()))} #{number} of ranks {list(ranks)} (use {use!r})"
            world.wait_until(
                lambda: len(meeting.what) == len(ranks), lambda: [r for r in ranks if r not in meeting.what], what
            )
            if len(set(meeting.what.values())) > 1:
                calls = "; ".join(f"rank {rank}: {meeting.what[rank]}" for rank in ranks)
                raise CommunicationError(
                    f"ranks called different collectives as number {number} (use {use!r}): {calls}"
                )
        with torch.no_grad():
            self._read(meeting)
        with world.changed:
            meeting.read += 1
            if meeting.read == len(ranks):
                del world.meetings[self._key]

    def is_done(self) -> bool:
        with self._world.changed:
            meeting = self._world.meetings.get(self._key)
            return meeting is None or len(meeting.what) == len(self._key[0])


class _LetterHandle:
    """Takes what was sent to this rank. what: the exchange, for reports."""

    def __init__(self, world: _World, expected: list[tuple[_Box, torch.Tensor]], what: str) -> None:
        self._world, self._expected, self._what = world, expected, what

    def wait(self) -> None:
        world = self._world
        for box, target in self._expected:
            what = f"{self._what} where rank {box[2]} receives {_kind(target)} from rank {box[1]}"
            with world.changed:
                world.wait_until(_has_letter(world, box), _sender_unless_there(world, box), what)
                letter = world.letters.pop(box)
            if letter.shape != target.shape or letter.dtype != target.dtype:
                raise CommunicationError(
                    f"{self._what}: rank {box[1]} sent {letter.dtype} {tuple(letter.shape)}, "
                    f"rank {box[2]} receives {target.dtype} {tuple(target.shape)}"
                )
            target.copy_(letter)

    def is_done(self) -> bool:
        with self._world.changed:
            return all(box in self._world.letters for box, _ in self._expected)


def _has_letter(world: _World, box: _Box) -> Callable[[], bool]:
    return lambda: box in world.letters


def _sender_unless_there(world: _World, box: _Box) -> Callable[[], list[int]]:
    return lambda: [] if box in world.letters else [box[1]]


class SimulatedTransport:
    """One rank's side of the meetings."""

    def __init__(self, world: _World, rank: int) -> None:
        self._world, self._rank = world, rank
        self._numbers: dict[tuple[tuple[int, ...], str], int] = {}
        self._boxes: dict[tuple[str, int, int], int] = {}

    def prepare(self, group: Group, device: torch.device) -> None:
        """Nothing to make."""

    def _meet(
        self,
        group: Group,
        what: str,
        tensor: torch.Tensor,
        read: Callable[[_Meeting], None],
        sizes: Sequence[int] = (),
    ) -> Handle:
        number = self._numbers.get(group.communicator, 0)
        self._numbers[group.communicator] = number + 1
        key = (*group.communicator, number)
        given = tensor.detach().clone()
        with self._world.changed:
            if self._world.failed is not None:
                raise _Stopped
            meeting = self._world.meetings.setdefault(key, _Meeting())
            meeting.given[self._rank], meeting.sizes[self._rank] = given, sizes
            meeting.what[self._rank] = what
            self._world.changed.notify_all()
        return _MeetingHandle(self._world, key, read)

    def all_reduce(self, group: Group, tensor: torch.Tensor, op: ReduceOp) -> Handle:
        reduce = _REDUCTIONS[op]

        def read(meeting: _Meeting) -> None:
            total = meeting.given[group.ranks[0]].clone()
            for rank in group.ranks[1:]:
                total = reduce(total, meeting.given[rank])
            tensor.copy_(total)

        return self._meet(group, f"all_reduce {op} of {_kind(tensor)}", tensor, read)

    def all_gather(self, group: Group, output: torch.Tensor, tensor: torch.Tensor) -> Handle:
        def read(meeting: _Meeting) -> None:
            output.view(-1).copy_(torch.cat([meeting.given[rank].view(-1) for rank in group.ranks]))

        return self._meet(group, f"all_gather of {_kind(tensor)}", tensor, read)

    def reduce_scatter(self, group: Group, output: torch.Tensor, tensor: torch.Tensor) -> Handle:
        def read(meeting: _Meeting) -> None:
            parts = [meeting.given[rank].view(group.size, -1)[group.index] for rank in group.ranks]
            total = parts[0].clone()
            for part in parts[1:]:
                total += part
            output.view(-1).copy_(total)

        return self._meet(group, f"reduce_scatter of {_kind(tensor)}", tensor, read)

    def all_to_all(
        self,
        group: Group,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
    ) -> Handle:
        def read(meeting: _Meeting) -> None:
            offered = {rank: meeting.sizes[rank][group.index] for rank in group.ranks}
            if list(offered.values()) != list(output_sizes):
                raise CommunicationError(
                    f"all_to_all: rank {self._rank} receives {list(output_sizes)} rows, is sent {list(offered.values())}"
                )
            ranges = []
            for rank in group.ranks:
                start = sum(meeting.sizes[rank][: group.index])
                ranges.append(meeting.given[rank][start : start + offered[rank]])
            output.copy_(torch.cat(ranges))

        what = f"all_to_all of {str(tensor.dtype).removeprefix('torch.')} rows {tuple(tensor.shape[1:])}"
        return self._meet(group, what, tensor, read, tuple(input_sizes))

    def broadcast(self, group: Group, tensor: torch.Tensor, source: int) -> Handle:
        def read(meeting: _Meeting) -> None:
            tensor.copy_(meeting.given[group.ranks[source]])

        return self._meet(group, f"broadcast from {source} of {_kind(tensor)}", tensor, read)

    def exchange(self, group: Group, transfers: Sequence[Transfer], tag: str) -> Handle:
        expected = []
        with self._world.changed:
            if self._world.failed is not None:
                raise _Stopped
            for transfer in transfers:
                peer = group.ranks[transfer.peer]
                if transfer.kind == "send":
                    box = self._next_box(group.name, self._rank, peer)
                    self._world.letters[box] = transfer.tensor.detach().clone()
                else:
                    expected.append((self._next_box(group.name, peer, self._rank), transfer.tensor))
            self._world.changed.notify_all()
        tagged = f", tag {tag!r}" if tag else ""
        what = f"an exchange of ranks {list(group.ranks)} (use {group.use!r}{tagged})"
        return _LetterHandle(self._world, expected, what)

    def _next_box(self, name: str, sender: int, receiver: int) -> _Box:
        number = self._boxes.get((name, sender, receiver), 0)
        self._boxes[name, sender, receiver] = number + 1
        return name, sender, receiver, number

    def symmetric_group(self, group: Group) -> str:
        del group
        return ""

    def close(self, grace_seconds: float) -> None:
        """Nothing to free."""


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def run_simulated(
    mesh: MeshLayout,
    fn: Callable[[Collectives], T],
    *,
    timeout: timedelta = timedelta(seconds=60),
    device: torch.device | None = None,
) -> list[T]:
    """Runs `fn(collectives)` for every rank of `mesh`, each in a thread, and returns the results in rank order.

    timeout: how long a rank waits for the others in one collective. When a rank raises, the others stop at their next collective, and
    the first exception is raised here. The caller's grad mode and default dtype hold in the ranks.
    """
    world = _World(mesh.world_size, timeout.total_seconds())
    results: dict[int, T] = {}
    grad_enabled = torch.is_grad_enabled()
    target = torch.device("cpu") if device is None else device

    def run(rank: int) -> None:
        try:
            transport = SimulatedTransport(world, rank)
            with torch.set_grad_enabled(grad_enabled):
                results[rank] = fn(RankCollectives(mesh, rank, target, Session(transport, Ledger(), None)))
        except _Stopped:
            return
        except BaseException as error:  # carried to the caller's thread, whatever it is
            world.fail(error)
        finally:
            world.finish(rank)

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(mesh.world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if world.failed is not None:
        raise world.failed
    return [results[rank] for rank in range(mesh.world_size)]
