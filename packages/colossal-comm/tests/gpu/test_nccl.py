"""The same collectives through NCCL, on as many GPUs as there are (at least two): values, gradients, compiled code, overlap, NaN."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from colossal_comm import RankCollectives, bench_collectives, join, leave
from colossal_core.collectives import Transfer
from colossal_core.mesh import MeshLayout

pytestmark = pytest.mark.gpu
NUM_RANKS = 2
PAIR = MeshLayout((1, 1, NUM_RANKS, 1, 1))


def asynchronous(collectives: RankCollectives) -> list[Any]:
    rank, device = collectives.rank, collectives.device
    total = torch.full((4,), rank + 1.0, device=device)
    largest = torch.tensor([float("nan") if rank else 1.0, float(rank)], device=device)
    gathered, received = torch.zeros(2 * NUM_RANKS, device=device), torch.empty(1, device=device)
    own = gathered[2 * rank : 2 * rank + 2].fill_(rank)
    swapped, rows = torch.empty(3 if rank else 1, device=device), torch.arange(2.0, device=device) + 10 * rank
    sizes = ([2, 1], [1, 1]) if rank else ([0, 1], [0, 2])  # rows received from and sent to each rank
    handles = [
        collectives.start_all_reduce(total, "dp_shard"),
        collectives.start_all_reduce(largest, "dp_shard", op="max"),
        collectives.start_all_gather(gathered, own, "dp_shard"),
        collectives.start_all_to_all(swapped, rows, "dp_shard", output_sizes=sizes[0], input_sizes=sizes[1]),
        collectives.start_exchange(
            [
                Transfer("receive", received, (rank - 1) % NUM_RANKS),
                Transfer("send", torch.tensor([rank + 0.5], device=device), (rank + 1) % NUM_RANKS),
            ],
            "dp_shard",
        ),
    ]
    for handle in handles:
        handle.wait()
    text = [str(value) for value in largest.tolist()]
    names = collectives.gather_bytes(b"r" * rank, "dp")
    return [total.tolist(), text, gathered.tolist(), swapped.tolist(), received.tolist(), names]


def differentiable(collectives: RankCollectives) -> tuple[float, float]:
    """The largest differences between eager and compiled code, in the output and in the gradient."""

    def block(x: torch.Tensor) -> torch.Tensor:
        y = collectives.all_gather(torch.relu(collectives.replicate(x, "dp_shard")), "dp_shard", dim=1)
        y = collectives.reduce_scatter(torch.sin(y), "dp_shard", dim=1)
        return collectives.all_reduce(collectives.all_to_all(y, "dp_shard"), "dp_shard", cotangent="partial")

    found = []
    for call in (block, torch.compile(block, fullgraph=True)):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(collectives.rank)).double()
        x = x.to(collectives.device).requires_grad_()
        y = call(x)
        torch.autograd.backward((y * y).sum())
        assert x.grad is not None
        found.append((y.detach(), x.grad))
    (first, first_gradient), (second, second_gradient) = found
    return (first - second).abs().max().item(), (first_gradient - second_gradient).abs().max().item()


def all_of_it(rank: int, address: str) -> tuple[list[Any], tuple[float, float], int]:
    collectives = join(PAIR, rank, torch.device("cuda", rank), address, timedelta(seconds=60))
    collectives.barrier("dp_shard")
    found = asynchronous(collectives), differentiable(collectives), len(bench_collectives(collectives, [1 << 20]))
    leave(collectives)
    return found


def test_nccl(start_ranks: Any) -> None:
    assert torch.accelerator.device_count() >= NUM_RANKS
    first, second = start_ranks(all_of_it, NUM_RANKS).outcomes(240)
    assert isinstance(first, tuple) and isinstance(second, tuple), f"{first}\n{second}"
    shared = [[3.0] * 4, ["nan", "1.0"], [0.0, 0.0, 1.0, 1.0]]
    assert first[0] == [*shared, [10.0], [1.5], [b"", b"r"]]
    assert second[0] == [*shared, [0.0, 1.0, 11.0], [0.5], [b"", b"r"]]
    for found in (first, second):
        assert max(found[1]) <= 1e-12
        assert found[2] == 6
