"""The one-process form of the collectives: every call is allowed and changes nothing."""

from __future__ import annotations

import pytest
import torch

from colossal_core.collectives import Collectives, Handle, SingleProcess, Transfer
from colossal_core.mesh import WORLD

AXES = ["tp", "shard", ("dp_replicate", "shard"), WORLD]


@pytest.fixture(params=AXES, ids=str)
def axes(request: pytest.FixtureRequest) -> str | tuple[str, ...]:
    found: str | tuple[str, ...] = request.param
    return found


@pytest.fixture
def alone() -> Collectives:
    return SingleProcess(torch.device("cpu"))


def done(handle: Handle) -> None:
    handle.wait()
    assert handle.is_done()


def test_every_group_has_one_rank(alone: Collectives, axes: str | tuple[str, ...]) -> None:
    assert (alone.rank, alone.size(axes), alone.index(axes), alone.mesh.world_size) == (0, 1, 0, 1)
    assert alone.device == torch.device("cpu")
    alone.barrier(axes)
    assert alone.gather_bytes(b"x", axes) == [b"x"]


def test_reductions_and_broadcasts_leave_the_tensor(alone: Collectives, axes: str | tuple[str, ...]) -> None:
    x, y = torch.arange(4.0), torch.arange(3)
    done(alone.start_all_reduce(x, axes))
    done(alone.start_all_reduce(x, axes, op="max"))
    done(alone.start_all_reduce_coalesced([x, y], axes))
    done(alone.start_broadcast(x, axes))
    assert torch.equal(x, torch.arange(4.0))
    assert torch.equal(y, torch.arange(3))


@pytest.mark.parametrize("in_place", [False, True])
def test_gathers_copy_the_only_part(alone: Collectives, axes: str | tuple[str, ...], in_place: bool) -> None:
    x = torch.arange(4.0)
    for start in (alone.start_all_gather, alone.start_reduce_scatter, alone.start_all_to_all):
        output = x if in_place else torch.zeros(4)
        done(start(output, x, axes))
        assert torch.equal(output, torch.arange(4.0))


def test_what_is_sent_to_oneself_arrives(alone: Collectives) -> None:
    sent, received = torch.arange(3.0), torch.zeros(3)
    done(alone.start_exchange([Transfer("receive", received, 0), Transfer("send", sent, 0)], "pp"))
    assert torch.equal(received, sent)
    alone.prepare("pp", "activations")
    more = torch.zeros(3)
    done(alone.start_exchange([Transfer("receive", more, 0), Transfer("send", sent, 0)], "pp", use="activations"))
    assert torch.equal(more, sent)
    with pytest.raises(ValueError) as caught:
        alone.start_exchange([Transfer("send", sent, 0)], "pp")
    assert str(caught.value) == "zip() argument 2 is longer than argument 1"


def test_differentiable_collectives_are_the_identity_both_ways(alone: Collectives, axes: str | tuple[str, ...]) -> None:
    for call in (
        alone.all_reduce,
        alone.replicate,
        alone.all_gather,
        alone.reduce_scatter,
        alone.own_range,
        alone.all_to_all,
        alone.broadcast,
    ):
        x = torch.arange(4.0, requires_grad=True)
        y = call(x, axes)
        assert torch.equal(y, x)
        (gradient,) = torch.autograd.grad(y, x, torch.arange(4.0) + 1)
        assert torch.equal(gradient, torch.arange(4.0) + 1)
