"""Debug mode: calls that do not fit together are errors that name each rank's call, not hangs, aborts or wrong numbers."""

from __future__ import annotations

import re
from typing import Any

import torch

from colossal_comm import RankCollectives
from colossal_core.collectives import Transfer
from colossal_core.mesh import MeshLayout

PAIR = MeshLayout((1, 1, 2, 1, 1))
ADVICE = "  every rank of a group must call the same collectives in the same order, with the same shape, dtype and tag"


def calls(collectives: RankCollectives, case: str) -> None:
    first, second = torch.ones(4), torch.ones(4)
    axes, rank = "dp_shard", collectives.rank
    collectives.start_all_reduce(first, axes, tag="fine").wait()
    if case == "swapped":
        order = [(first, "a"), (second, "b")] if rank == 0 else [(second, "b"), (first, "a")]
        for tensor, tag in order:
            collectives.start_all_reduce(tensor, axes, tag=tag).wait()
    elif case == "swapped without tags":
        if rank == 0:
            collectives.start_all_reduce(first, axes).wait()
        else:
            collectives.start_all_reduce(second, axes).wait()
    elif case == "shape":
        collectives.start_all_reduce(torch.ones(4 + rank), axes).wait()
    elif case == "dtype":
        collectives.start_all_reduce(first.to(torch.int32) if rank else first, axes).wait()
    elif case == "operation":
        if rank:
            collectives.start_all_gather(torch.empty(8), first, axes, use="reduce").wait()
        else:
            collectives.start_all_reduce(first, axes).wait()
    elif case == "sizes":
        sizes = [2, 2] if rank == 0 else [1, 3]
        collectives.start_all_to_all(second, first, axes, output_sizes=[2, 2], input_sizes=sizes).wait()
    elif case == "hang" and rank == 0:
        collectives.start_all_reduce(first, axes, tag="grad bucket 3").wait()
    elif case == "transfer":
        half = Transfer("send", torch.ones(3), 1) if rank == 0 else Transfer("receive", torch.ones(4), 0)
        collectives.start_exchange([half], axes, tag="activations").wait()
    elif case == "missing transfer":
        half = Transfer("send", first, 1) if rank == 0 else Transfer("receive", second, 0)
        for _ in range(rank + 1):
            collectives.start_exchange([half], axes, use="links", tag="F0.0").wait()
    elif case == "compiled":
        tag = "in the first layer" if rank == 0 else "in the second layer"
        torch.compile(lambda x: collectives.all_reduce(x, axes, tag=tag), fullgraph=True, backend="aot_eager")(first)


def messages(start_ranks: Any, case: str, timeout_seconds: float = 20) -> list[str]:
    """What the ranks said, with the places of the calls taken out."""
    found = start_ranks(calls, 2, case, mesh=PAIR, debug=True, timeout_seconds=timeout_seconds).outcomes()
    assert all(outcome is None or outcome.kind == "CommunicationError" for outcome in found), found
    return ["" if outcome is None else re.sub(r"at \S*/([^/]+):\d+", r"at \1", outcome.message) for outcome in found]


def mismatch(number: int, use: str, first: str, second: str) -> str:
    return (
        f"ranks called different collectives as number {number} on one communicator (use '{use}'):\n"
        f"  rank 0: {first}, at test_debug.py\n  rank 1: {second}, at test_debug.py\n{ADVICE}"
    )


CALL = "all_reduce #1 over dp_shard, (4,), float32, sum"


def test_swapped_collectives_of_one_shape(start_ranks: Any) -> None:
    expected = mismatch(1, "reduce", f"{CALL}, tag 'a'", f"{CALL}, tag 'b'")
    assert messages(start_ranks, "swapped") == [expected, expected]
    assert messages(start_ranks, "swapped without tags") == [mismatch(1, "reduce", CALL, CALL)] * 2


def test_wrong_shape_dtype_operation_and_sizes(start_ranks: Any) -> None:
    assert messages(start_ranks, "shape")[1] == mismatch(1, "reduce", CALL, CALL.replace("(4,)", "(5,)"))
    assert messages(start_ranks, "dtype")[0] == mismatch(1, "reduce", CALL, CALL.replace("float32", "int32"))
    gather = "all_gather #1 over dp_shard, (4,), float32"
    assert messages(start_ranks, "operation")[0] == mismatch(1, "reduce", CALL, gather)
    expected = mismatch(
        0,
        "all_to_all",
        "all_to_all #0 over dp_shard, rows of (), float32, sends [2, 2] and receives [2, 2] rows",
        "all_to_all #0 over dp_shard, rows of (), float32, sends [1, 3] and receives [2, 2] rows",
    )
    assert messages(start_ranks, "sizes") == [expected, expected]


def test_a_rank_that_never_arrives_is_named_with_its_last_call(start_ranks: Any) -> None:
    first, second = messages(start_ranks, "hang", timeout_seconds=1)
    assert first == (
        "ranks {1} never reached all_reduce #1 over dp_shard (use 'reduce', tag 'grad bucket 3') within 1 s\n"
        "  rank 1 last announced: all_reduce #0 over dp_shard, (4,), float32, sum, tag 'fine', at test_debug.py\n"
        "  look at what these ranks do instead: a condition that differs between ranks, an exception, or a slow step"
    )
    assert second == ""


def test_a_transfer_that_does_not_fit(start_ranks: Any) -> None:
    _, second = messages(start_ranks, "transfer")
    assert second == (
        "rank 0 sends something else than rank 1 receives (transfer 0 between them over dp_shard):\n"
        "  rank 0 sends (3,), float32, tag 'activations', at test_debug.py\n"
        "  rank 1 receives (4,), float32, tag 'activations', at test_debug.py\n"
        "  both must name the same shape, dtype and tag, in the same order"
    )


def test_a_transfer_that_never_comes_is_named_with_the_last_call_of_its_sender(start_ranks: Any) -> None:
    _, second = messages(start_ranks, "missing transfer", timeout_seconds=1)
    assert second == (
        "ranks {0} never reached exchange #1 over dp_shard (use 'links', tag 'F0.0'; rank 1 receives float32 (4,) from rank 0) within 1 s\n"
        "  rank 0 last announced: exchange #0 over dp_shard, (4,), float32, rank 0 sends float32 (4,) to rank 1, tag 'F0.0', "
        "at test_debug.py\n"
        "  look at what these ranks do instead: a condition that differs between ranks, an exception, or a slow step"
    )


def test_compiled_code_is_checked_too(start_ranks: Any) -> None:
    first, second = messages(start_ranks, "compiled")
    assert "tag 'in the first layer'" in first and "tag 'in the second layer'" in first
    assert first == second
