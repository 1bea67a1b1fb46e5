"""What all views of one group of ranks share: the transport, the ledger, the debug mode and the counts of calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from colossal_comm.ledger import Ledger
    from colossal_comm.transport import Call, Group, Transport
    from colossal_core.collectives import Handle, Transfer


class Guard(Protocol):
    """Looks at every collective before it starts: the debug mode."""

    def check(self, call: Call) -> None:
        """Returns when all members of the group have announced the same call; raises CommunicationError otherwise."""

    def exchange(
        self, call: Call, transfers: Sequence[Transfer], issue: Callable[[Sequence[Transfer]], Handle]
    ) -> Handle:
        """Starts a point-to-point exchange under the guard."""


@dataclass
class Session:
    """What all views of one group of ranks share: how bytes move, what was sent, and the number of calls on each communicator."""

    transport: Transport | None
    ledger: Ledger
    guard: Guard | None
    sequences: dict[tuple[tuple[int, ...], str], int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_sequence(self, group: Group) -> int:
        with self.lock:
            number = self.sequences.get(group.communicator, 0)
            self.sequences[group.communicator] = number + 1
        return number
