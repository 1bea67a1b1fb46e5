"""Collectives over a sharing set: the ranks of its stages, and a clear refusal everywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colossal_comm import RankCollectives, silent_rank
from colossal_core.mesh import MeshLayout, SharingSet

NAME = "shared:wte"


def shared_sums(collectives: RankCollectives) -> Any:
    if NAME not in collectives.mesh.coordinate(collectives.rank):
        return refusals(collectives)
    alone, together, number = (
        torch.tensor([2.0**collectives.rank]),
        torch.tensor([2.0**collectives.rank]),
        collectives.rank,
    )
    collectives.prepare(NAME, "reduce")
    collectives.start_all_reduce(alone, NAME).wait()
    axes = ("dp_shard", NAME) if collectives.size("dp_shard") > 1 else (NAME,)
    collectives.start_all_reduce(together, axes).wait()
    gathered = torch.empty(collectives.size(axes))
    collectives.start_all_gather(gathered, torch.tensor([float(number)]), axes).wait()
    x = torch.tensor([3.0], requires_grad=True)
    torch.autograd.backward(collectives.all_reduce(x, NAME, cotangent="partial").sum())
    assert x.grad is not None
    return alone.item(), together.item(), gathered.tolist(), collectives.index(NAME), x.grad.item()


def refusals(collectives: RankCollectives) -> list[str]:
    """What a rank off the stages is told."""
    x, output = torch.ones(1), torch.ones(2)
    assert collectives.size(NAME) == 2
    found = []
    for call in (
        lambda: collectives.start_all_reduce(x, NAME),
        lambda: collectives.start_all_reduce_coalesced([x], NAME),
        lambda: collectives.start_all_gather(output, x, NAME),
        lambda: collectives.start_exchange([], NAME),
        lambda: collectives.prepare(NAME, "reduce"),
        lambda: collectives.index(NAME),
        lambda: collectives.all_reduce(x, NAME),
        lambda: collectives.gather_bytes(b"", NAME),
        lambda: collectives.barrier(NAME),
    ):
        with pytest.raises(AssertionError) as caught:
            call()
        found.append(str(caught.value))
    return found


@pytest.mark.parametrize(
    ("num_stages", "num_data_parallel"), [(3, 1), (4, 1), (4, 2)], ids=["3 stages", "4 stages", "4 stages x dp 2"]
)
def test_the_ranks_of_the_stages_sum_and_the_others_are_refused(
    on_mesh: Any, num_stages: int, num_data_parallel: int
) -> None:
    shared = SharingSet(NAME, (0, num_stages - 1))
    mesh = MeshLayout((num_stages, 1, num_data_parallel, 1, 1)).with_sharing(shared)
    found = on_mesh(mesh, shared_sums)
    last = (num_stages - 1) * num_data_parallel
    for rank in range(mesh.world_size):
        if 0 < rank // num_data_parallel < num_stages - 1:
            assert found[rank] == [f"rank {rank} is on none of the stages of {shared}"] * 9
            continue
        place = rank % num_data_parallel
        order = [member for pair in range(num_data_parallel) for member in (pair, last + pair)]
        total = sum(2.0**member for member in order)
        expected = 2.0**place + 2.0 ** (last + place), total, order, rank // last, 2.0
        assert found[rank] == expected


def test_a_rank_without_others_prepares_nothing() -> None:
    collectives = silent_rank(MeshLayout((4, 1, 1, 1, 1)).with_sharing(SharingSet(NAME, (0, 3))), 3)
    collectives.prepare("pp", "activations")
    collectives.prepare(NAME, "reduce")
    collectives.prepare("tp", "compute")
