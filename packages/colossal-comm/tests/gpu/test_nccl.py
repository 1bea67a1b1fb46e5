"""The same collectives through NCCL, on as many GPUs as there are (at least two): values, gradients, compiled code, overlap, NaN,
and the exchanges of a pipeline."""

from __future__ import annotations

import time
import weakref
from datetime import timedelta
from typing import Any, Literal

import pytest
import torch

from colossal_comm import RankCollectives, bench_collectives, join, leave
from colossal_comm.groups import TorchTransport
from colossal_core.collectives import Handle, Transfer
from colossal_core.mesh import MeshLayout

pytestmark = pytest.mark.gpu
NUM_RANKS = 2
PAIR = MeshLayout((1, 1, NUM_RANKS, 1, 1))
STAGES = MeshLayout((NUM_RANKS, 1, 1, 1, 1))
NUM_MICROBATCHES = 8
NUM_ELEMENTS = 1 << 20  # 4 MiB a message, above what NCCL buffers: a send ends only when it is received


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


def one(collectives: RankCollectives, kind: Literal["send", "receive"], tensor: torch.Tensor, use: str) -> Handle:
    return collectives.start_exchange([Transfer(kind, tensor, 1 - collectives.rank)], "pp", use=use)


def warm_up(device: torch.device) -> None:
    """Loads the kernels and takes the memory that `pipelined` needs: CUDA may synchronise for either, while a receive is still waiting."""
    taken = [torch.full((NUM_ELEMENTS,), 1.0, device=device) for _ in range(3 * NUM_MICROBATCHES)]
    assert (2 * taken[0] + 1).mean().item() == 3.0


def pipelined(collectives: RankCollectives) -> tuple[list[float], bool]:
    """Activations one way and gradients the other, every receive posted before the first send, no send waited for.

    Were the uses one communicator, both ranks' sends would stand behind their own receives for ever. Returns the mean of each tensor
    received, and whether the sent tensors were let go by handles that were only asked.
    """
    incoming, outgoing = ("gradients", "activations") if collectives.rank == 0 else ("activations", "gradients")
    received = [torch.empty(NUM_ELEMENTS, device=collectives.device) for _ in range(NUM_MICROBATCHES)]
    receives = [one(collectives, "receive", tensor, incoming) for tensor in received]
    sends: list[Handle] = []
    sent: list[weakref.ref[torch.Tensor]] = []
    for number in range(NUM_MICROBATCHES):
        if collectives.rank == 0:
            tensor = torch.full((NUM_ELEMENTS,), float(number), device=collectives.device)
        else:
            receives[number].wait()
            tensor = 2 * received[number] + 1
        sends.append(one(collectives, "send", tensor, outgoing))
        sent.append(weakref.ref(tensor))
        del tensor
    for handle in receives:
        handle.wait()
    means = [tensor.mean().item() for tensor in received]
    deadline = time.monotonic() + 30
    while not all(handle.is_done() for handle in sends) and time.monotonic() < deadline:
        time.sleep(0.01)
    return means, all(found() is None for found in sent)


def wait_orders_the_stream(collectives: RankCollectives) -> float:
    """The receiver's `wait` returns before the sender starts: the sender asks the store whether it has. Returns what was received."""
    transport = collectives._session.transport
    assert isinstance(transport, TorchTransport)
    tensor = torch.full((NUM_ELEMENTS,), 3.0 - 3.0 * collectives.rank, device=collectives.device)
    if collectives.rank == 0:
        transport.store.wait(["test/wait returned"], timedelta(seconds=30))
        one(collectives, "send", tensor, "activations").wait()
        return 0.0
    handle = one(collectives, "receive", tensor, "activations")
    assert not handle.is_done()
    handle.wait()
    doubled = (2 * tensor).mean()
    transport.store.set("test/wait returned", "1")
    return doubled.item()


def stages(rank: int, address: str) -> tuple[tuple[list[float], bool], float]:
    collectives = join(STAGES, rank, torch.device("cuda", rank), address, timedelta(seconds=60))
    for use in ("activations", "gradients"):
        collectives.prepare("pp", use)
    warm_up(collectives.device)
    found = pipelined(collectives), wait_orders_the_stream(collectives)
    leave(collectives)
    return found


def test_exchanges_over_two_uses_do_not_hold_each_other_up(start_ranks: Any) -> None:
    assert torch.accelerator.device_count() >= NUM_RANKS
    first, second = start_ranks(stages, NUM_RANKS).outcomes(240)
    assert isinstance(first, tuple) and isinstance(second, tuple), f"{first}\n{second}"
    numbers = [float(number) for number in range(NUM_MICROBATCHES)]
    assert first == (([2 * number + 1 for number in numbers], True), 0.0)
    assert second == ((numbers, True), 6.0)
