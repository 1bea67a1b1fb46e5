"""A rank without others: shapes on fake tensors, and the same ranks for a copy of what holds it."""

from __future__ import annotations

import copy

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from colossal_comm import silent_rank
from colossal_core.mesh import MeshLayout

MESH = MeshLayout((1, 1, 1, 1, 4))


def test_shapes_forward_and_backward() -> None:
    collectives = silent_rank(MESH, 1)
    assert (collectives.rank, collectives.index("tp"), collectives.size("tp")) == (1, 1, 4)
    with FakeTensorMode():
        x = torch.empty(8, 3, requires_grad=True)
        gathered = collectives.all_gather(collectives.replicate(x, "tp"), "tp", dim=1)
        part = collectives.reduce_scatter(collectives.all_reduce(gathered, "tp"), "tp", dim=0)
        (gradient,) = torch.autograd.grad(part.sum(), x)
    assert (tuple(gathered.shape), tuple(part.shape), tuple(gradient.shape)) == ((8, 12), (2, 12), (8, 3))
    assert collectives.ledger.rows() == ()


def test_a_copy_sees_the_same_ranks() -> None:
    collectives = silent_rank(MESH)
    assert copy.deepcopy([collectives])[0] is collectives
