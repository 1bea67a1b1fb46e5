"""The asynchronous collectives against what they should be, on gloo, on gloo under debug mode, and on simulated ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d as c10d

from colossal_comm import RankCollectives, _torch_private
from colossal_comm.groups import TorchTransport
from colossal_comm.transport import Group
from colossal_core.collectives import Transfer
from colossal_core.mesh import MeshLayout

PAIR = MeshLayout((1, 1, 2, 1, 1))
SQUARE = MeshLayout((1, 1, 2, 1, 2))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)


def sums(collectives: RankCollectives) -> dict[str, Any]:
    found = {}
    for dtype in DTYPES:
        tensor = torch.tensor([1, 2, 3], dtype=dtype) * (collectives.rank + 1)
        collectives.start_all_reduce(tensor, "dp_shard").wait()
        found[str(dtype)] = (tensor.dtype == dtype, tensor.tolist())
    return found


def test_all_reduce_sums_every_dtype(on_mesh: Any) -> None:
    expected = {str(dtype): (True, [3, 6, 9]) for dtype in DTYPES}
    assert on_mesh(PAIR, sums) == [expected, expected]


def extremes(collectives: RankCollectives, dtype: torch.dtype) -> tuple[list[str], list[str], list[int]]:
    rows = [[1.0, math.nan, -math.inf, 2.0], [3.0, 1.0, -math.inf, math.nan]]
    largest = torch.tensor(rows[collectives.rank], dtype=dtype)
    smallest = largest.clone()
    whole = torch.tensor([collectives.rank, 5])
    handles = [
        collectives.start_all_reduce(largest, "dp_shard", op="max"),
        collectives.start_all_reduce(smallest, "dp_shard", op="min"),
        collectives.start_all_reduce(whole, "dp_shard", op="max"),
    ]
    for handle in handles:
        handle.wait()
    return [str(x) for x in largest.tolist()], [str(x) for x in smallest.tolist()], whole.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_max_and_min_keep_nan_and_infinity(on_mesh: Any, dtype: torch.dtype) -> None:
    expected = (["3.0", "nan", "-inf", "nan"], ["1.0", "nan", "-inf", "nan"], [1, 5])
    assert on_mesh(PAIR, extremes, dtype) == [expected, expected]


def coalesced(collectives: RankCollectives) -> tuple[list[list[float]], int]:
    scale = collectives.rank + 1
    strided = torch.ones(4, 2).t() * scale
    tensors = [torch.ones(3) * scale, torch.ones(2, dtype=torch.float64) * scale, torch.empty(0), strided[:, :2]]
    collectives.start_all_reduce_coalesced(tensors, "tp", tag="norms").wait()
    return [tensor.reshape(-1).tolist() for tensor in tensors], collectives.ledger.num_calls(tag="norms")


def test_coalesced_sums_use_one_message_per_dtype(on_mesh: Any) -> None:
    expected = ([[3.0] * 3, [3.0] * 2, [], [3.0] * 4], 2)
    assert on_mesh(MeshLayout((1, 1, 1, 1, 2)), coalesced) == [expected, expected]


def in_place(collectives: RankCollectives) -> tuple[list[float], list[float], list[float]]:
    rank = collectives.rank
    gathered = torch.full((4,), -1.0)
    own = gathered[2 * rank : 2 * rank + 2]
    own.copy_(torch.tensor([10.0 * rank, 10.0 * rank + 1]))
    collectives.start_all_gather(gathered, own, "shard").wait()
    summed = torch.arange(4.0) + rank
    kept = summed[2 * rank : 2 * rank + 2]
    collectives.start_reduce_scatter(kept, summed, "shard").wait()
    separate, source = torch.empty(2), torch.arange(4.0)
    collectives.start_reduce_scatter(separate, source, "shard").wait()
    assert source.tolist() == [0, 1, 2, 3]
    return gathered.tolist(), kept.tolist(), separate.tolist()


def test_gather_and_scatter_in_place_and_not(on_mesh: Any) -> None:
    first, second = on_mesh(PAIR, in_place)
    assert first == ([0, 1, 10, 11], [1, 3], [0, 2])
    assert second == ([0, 1, 10, 11], [5, 7], [4, 6])


def uneven(collectives: RankCollectives) -> tuple[list[Any], list[Any], int]:
    rank = collectives.rank
    sent = torch.arange(6.0).view(3, 2) + 100 * rank
    input_sizes, output_sizes = ([0, 3], [0, 1]) if rank == 0 else ([1, 2], [3, 2])
    received = torch.empty(sum(output_sizes), 2)
    collectives.start_all_to_all(
        received, sent, "tp", output_sizes=output_sizes, input_sizes=input_sizes, tag="uneven"
    ).wait()
    even = torch.empty(4)
    collectives.start_all_to_all(even, torch.arange(4.0) + 10 * rank, "tp").wait()
    return received.tolist(), even.tolist(), collectives.ledger.sent_bytes(tag="uneven")


def test_all_to_all_even_and_uneven(on_mesh: Any) -> None:
    first, second = on_mesh(MeshLayout((1, 1, 1, 1, 2)), uneven)
    assert first == ([[100, 101]], [0, 1, 10, 11], 24)
    assert second == ([[0, 1], [2, 3], [4, 5], [102, 103], [104, 105]], [2, 3, 12, 13], 8)


def broadcasts(collectives: RankCollectives) -> tuple[list[float], list[float]]:
    tensor = torch.full((2, 2), float(collectives.rank)).t()[:, :1]
    collectives.start_broadcast(tensor, "tp", source=1).wait()
    flat = torch.full((3,), float(collectives.rank))
    collectives.start_broadcast(flat, ("dp_shard", "tp"), source=2).wait()
    return tensor.reshape(-1).tolist(), flat.tolist()


def test_broadcast_within_a_row_and_to_all(on_mesh: Any) -> None:
    assert on_mesh(SQUARE, broadcasts) == [([rank // 2 * 2 + 1.0] * 2, [2.0] * 3) for rank in range(4)]


def ring(collectives: RankCollectives) -> list[float]:
    rank, axes = collectives.index("cp"), "cp"
    after, before = (rank + 1) % 4, (rank - 1) % 4
    first, second, own = torch.empty(1), torch.empty(2), torch.empty(1)
    handle = collectives.start_exchange(
        [
            Transfer("receive", first, before),
            Transfer("receive", own, rank),
            Transfer("send", torch.tensor([float(rank)]), after),
            Transfer("receive", second, before),
            Transfer("send", torch.tensor([rank + 0.25, rank + 0.5]), after),
            Transfer("send", torch.tensor([rank * 100.0]), rank),
        ],
        axes,
        tag="ring",
    )
    handle.wait()
    return [*first.tolist(), *second.tolist(), *own.tolist()]


def test_exchange_in_any_order_with_several_a_pair_and_with_oneself(on_mesh: Any) -> None:
    found = on_mesh(MeshLayout((1, 1, 1, 4, 1)), ring)
    assert found == [[before, before + 0.25, before + 0.5, rank * 100] for rank, before in enumerate([3, 0, 1, 2])]


def early_receives(collectives: RankCollectives) -> list[float]:
    other = 1 - collectives.rank
    received = [torch.empty(1) for _ in range(2)]
    receives = [collectives.start_exchange([Transfer("receive", tensor, other)], "pp") for tensor in received]
    sends = [
        collectives.start_exchange([Transfer("send", torch.tensor([collectives.rank + 10.0 * k]), other)], "pp")
        for k in range(2)
    ]
    for handle in (*reversed(receives), *sends):
        handle.wait()
    assert all(handle.is_done() for handle in (*receives, *sends))
    return [tensor.item() for tensor in received]


def test_receives_may_be_posted_before_the_sends_and_waited_for_in_any_order(on_mesh: Any) -> None:
    assert on_mesh(MeshLayout((2, 1, 1, 1, 1)), early_receives) == [[1.0, 11.0], [0.0, 10.0]]


def one_of_four(collectives: RankCollectives) -> float:
    """Only ranks 1 and 2 of four exchange; the communicator has been made by all."""
    collectives.prepare("pp", "exchange")
    tensor = torch.zeros(1)
    if collectives.rank == 1:
        collectives.start_exchange([Transfer("send", tensor + 7, 2)], "pp").wait()
    if collectives.rank == 2:
        collectives.start_exchange([Transfer("receive", tensor, 1)], "pp").wait()
    return tensor.item()


def test_two_of_four_ranks_may_exchange(on_mesh: Any) -> None:
    assert on_mesh(MeshLayout((4, 1, 1, 1, 1)), one_of_four) == [0, 0, 7, 0]


def overlapping(collectives: RankCollectives) -> tuple[list[float], list[float], list[int], list[int]]:
    """Many on their way at once, on two communicators and two axes, and groups in an order that is not ascending."""
    tensors = [torch.full((8,), float(collectives.rank + k)) for k in range(6)]
    handles = [collectives.start_all_reduce(t, "tp" if k % 2 else "dp_shard") for k, t in enumerate(tensors)]
    output = torch.empty(4)
    own = torch.tensor([float(collectives.rank)])
    gather = collectives.start_all_gather(output, own, ("tp", "dp_shard"))
    for handle in reversed(handles):
        handle.wait()
    gather.wait()
    gather.wait()
    assert gather.is_done()
    names = collectives.gather_bytes(f"rank {collectives.rank}".encode() * collectives.rank, ("tp", "dp_shard"))
    assert names == [f"rank {rank}".encode() * rank for rank in (0, 2, 1, 3)]
    assert collectives.gather_bytes(b"", "tp") == [b"", b""]
    collectives.barrier("dp")
    index = [collectives.index(axes) for axes in ("tp", "dp_shard", ("dp_shard", "tp"), ("tp", "dp_shard"), "pp")]
    size = [collectives.size(axes) for axes in ("tp", "dp", ("dp_shard", "tp"), "pp")]
    return [tensor[0].item() for tensor in tensors], output.tolist(), index, size


def test_overlap_group_order_bytes_and_barrier(on_mesh: Any) -> None:
    for rank, (reduced, gathered, index, size) in enumerate(on_mesh(SQUARE, overlapping)):
        row, column = divmod(rank, 2)
        assert reduced == [2 * column + 2 + 2 * k if k % 2 == 0 else 4 * row + 1 + 2 * k for k in range(6)]
        assert gathered == [0, 2, 1, 3]
        assert index == [column, row, rank, column * 2 + row, 0]
        assert size == [2, 2, 4, 1]


def size_one(collectives: RankCollectives) -> tuple[str, bool]:
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    output = torch.empty(2)
    collectives.start_all_gather(output, tensor.detach(), "tp").wait()
    collectives.start_all_reduce(output, ("tp", "cp")).wait()
    collectives.barrier("tp")
    same = collectives.all_reduce(tensor, "tp") is tensor and collectives.all_gather(tensor, "cp") is tensor
    return collectives.ledger.table(), same and output.tolist() == [1, 2] and collectives.gather_bytes(b"x", "tp") == [
        b"x"
    ]


def test_an_axis_of_size_one_costs_nothing(on_mesh: Any) -> None:
    empty = "axes   operation  tag  calls  bytes sent\ntotal                      0           0"
    assert on_mesh(PAIR, size_one) == [(empty, True), (empty, True)]


def other_mesh(collectives: RankCollectives) -> tuple[float, float, int]:
    seen = collectives.with_mesh(MeshLayout((1, 1, 1, 1, 2)))
    first, second = torch.ones(1), torch.ones(1)
    collectives.start_all_reduce(first, "dp").wait()
    seen.start_all_reduce(second, "tp").wait()
    return first.item(), second.item(), collectives.ledger.num_calls()


def test_the_same_ranks_through_another_mesh(on_mesh: Any) -> None:
    assert on_mesh(PAIR, other_mesh) == [(2.0, 2.0, 2)] * 2


def announced(collectives: RankCollectives) -> tuple[str, list[tuple[str, str, int, int]]]:
    group = collectives.symmetric_group("dp_shard")
    collectives.announce("all_gather", torch.ones(3, 4), "dp_shard", tag="by hand")
    collectives.announce("reduce_scatter", torch.ones(4), "tp", tag="alone")
    return group, [(row.operation, row.tag, row.num_calls, row.sent_bytes) for row in collectives.ledger.rows()]


def test_a_cpu_has_no_symmetric_memory_and_what_is_announced_is_counted(on_mesh: Any) -> None:
    expected = ("", [("all_gather", "by hand", 1, 48)])
    assert on_mesh(MeshLayout((1, 1, 2, 1, 1)), announced) == [expected, expected]


def name_that_torch_finds(collectives: RankCollectives) -> tuple[str, int]:
    transport = collectives._session.transport
    assert isinstance(transport, TorchTransport)
    group = transport._process_group(Group(("dp_shard",), "compute", (0, 1), collectives.rank))
    name = _torch_private.registered_name(group)
    resolve: Any = vars(c10d)["_resolve_process_group"]
    return name, resolve(name).size()


def test_torch_finds_a_group_by_its_registered_name(on_gloo: Any) -> None:
    assert on_gloo(PAIR, name_that_torch_finds) == [("colossal.compute.0_1", 2)] * 2
