"""What this rank has sent, by mesh axes, operation and tag: for tests that bound communication and for users who ask where time goes.

Bytes are those that one rank SENDS under the bandwidth-optimal (ring) algorithm, whatever the backend really runs, so that the same
program counts the same on gloo and NCCL. With n ranks and M the bytes of the full tensor (the sum, or the gathered one):

| operation        | sent by a rank                                                          |
|------------------|-------------------------------------------------------------------------|
| all_reduce       | 2 (n-1)/n M (Patarasuk and Yuan, 2009)                                  |
| all_gather       | (n-1)/n M                                                               |
| reduce_scatter   | (n-1)/n M                                                               |
| broadcast        | (n-1)/n M (the mean over ranks: n-1 of them receive M)                  |
| all_to_all       | the ranges that go to other ranks (even sizes: (n-1)/n M)               |
| exchange         | the tensors sent to other ranks                                         |
| gather_bytes     | (n-1) (8 + the longest), counted as two all_gathers                     |
| barrier          | an all_reduce of 4 bytes                                                |

Fractions are rounded up. Groups of one rank send nothing and are not counted. Counting happens when a collective runs, in compiled
code too (the count is taken inside the custom operator, not at trace time), and in the backward pass of differentiable ones.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass


def ring_bytes(operation: str, num_ranks: int, full_bytes: int) -> int:
    """Bytes that a rank sends in `operation` among `num_ranks` ranks on a full tensor of `full_bytes`, rounded up."""
    steps = 2 * (num_ranks - 1) if operation == "all_reduce" else num_ranks - 1
    return -(-steps * full_bytes // num_ranks)


@dataclass(frozen=True)
class LedgerRow:
    """The sum over all calls with the same axes, operation and tag. sent_bytes: by this rank."""

    axes: tuple[str, ...]
    operation: str
    tag: str
    num_calls: int
    sent_bytes: int


class Ledger:
    """Counts calls and bytes. Safe to record from autograd's threads; reading takes a copy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[tuple[str, ...], str, str], tuple[int, int]] = {}

    def record(self, axes: Sequence[str], operation: str, tag: str, sent_bytes: int) -> None:
        key = (tuple(axes), operation, tag)
        with self._lock:
            calls, total = self._counts.get(key, (0, 0))
            self._counts[key] = (calls + 1, total + sent_bytes)

    def reset(self) -> None:
        """Forgets everything counted so far."""
        with self._lock:
            self._counts.clear()

    def rows(
        self, *, axes: str | Sequence[str] | None = None, operation: str | None = None, tag: str | None = None
    ) -> tuple[LedgerRow, ...]:
        """The counts that match, in order of first use. None matches everything."""
        wanted = (axes,) if isinstance(axes, str) else None if axes is None else tuple(axes)
        with self._lock:
            found = [LedgerRow(*key, *counts) for key, counts in self._counts.items()]
        return tuple(
            row
            for row in found
            if (wanted is None or row.axes == wanted)
            and (operation is None or row.operation == operation)
            and (tag is None or row.tag == tag)
        )

    def num_calls(
        self, *, axes: str | Sequence[str] | None = None, operation: str | None = None, tag: str | None = None
    ) -> int:
        return sum(row.num_calls for row in self.rows(axes=axes, operation=operation, tag=tag))

    def sent_bytes(
        self, *, axes: str | Sequence[str] | None = None, operation: str | None = None, tag: str | None = None
    ) -> int:
        return sum(row.sent_bytes for row in self.rows(axes=axes, operation=operation, tag=tag))

    def table(self) -> str:
        """The counts as aligned text, one line each, with a total."""
        lines = [("axes", "operation", "tag", "calls", "bytes sent")]
        rows = self.rows()
        lines += [
            (",".join(row.axes), row.operation, row.tag, str(row.num_calls), f"{row.sent_bytes:,}") for row in rows
        ]
        calls, sent = sum(row.num_calls for row in rows), sum(row.sent_bytes for row in rows)
        lines.append(("total", "", "", str(calls), f"{sent:,}"))
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def __str__(self) -> str:
        return self.table()
