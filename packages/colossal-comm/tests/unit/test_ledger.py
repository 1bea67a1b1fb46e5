"""Counting, filtering, printing."""

from __future__ import annotations

import pytest

from colossal_comm import Ledger, LedgerRow
from colossal_comm.ledger import ring_bytes


@pytest.mark.parametrize(
    ("operation", "num_ranks", "full_bytes", "sent"),
    [
        ("all_reduce", 4, 1000, 1500),
        ("all_gather", 4, 1000, 750),
        ("reduce_scatter", 2, 64, 32),
        ("broadcast", 2, 64, 32),
        ("all_reduce", 3, 4, 6),
    ],
)
def test_ring_bytes(operation: str, num_ranks: int, full_bytes: int, sent: int) -> None:
    assert ring_bytes(operation, num_ranks, full_bytes) == sent


def test_rows_filters_table_and_reset() -> None:
    ledger = Ledger()
    ledger.record(("dp_shard", "cp"), "all_reduce", "grad bucket 0", 1_000_000)
    ledger.record(("dp_shard", "cp"), "all_reduce", "grad bucket 0", 500)
    ledger.record(("tp",), "all_gather", "", 8)
    assert ledger.rows(axes="tp") == (LedgerRow(("tp",), "all_gather", "", 1, 8),)
    assert ledger.num_calls(axes=("dp_shard", "cp")) == 2
    assert ledger.sent_bytes(operation="all_reduce", tag="grad bucket 0") == 1_000_500
    assert ledger.sent_bytes() == 1_000_508
    assert str(ledger) == "\n".join(
        [
            "axes         operation   tag            calls  bytes sent",
            "dp_shard,cp  all_reduce  grad bucket 0      2   1,000,500",
            "tp           all_gather                     1           8",
            "total                                       3   1,000,508",
        ]
    )
    ledger.reset()
    assert ledger.rows() == ()
