"""The reference ops of a mixture of experts against independent computations in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from colossal_core.ops.experts import (
    expert_order,
    expert_permute,
    expert_unpermute,
    experts,
    grouped_matmul,
    num_rows,
    route,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_route_is_softmax_then_the_largest_then_their_share(normalize: bool) -> None:
    logits = randn(6, 9).requires_grad_()
    weights, picked = route(logits, 3, normalize=normalize)
    wanted, indices = torch.topk(torch.softmax(logits, dim=-1), 3, dim=-1)
    if normalize:
        wanted = wanted / wanted.sum(dim=-1, keepdim=True)
    assert torch.equal(picked, indices)
    same(weights, wanted)
    same(*(torch.autograd.grad((x * randn(6, 3, seed=1)).sum(), logits)[0] for x in (weights, wanted)))


def test_route_weighs_in_float32_and_prefers_the_lower_index() -> None:
    weights, picked = route(torch.tensor([[1.0, 2.0, 2.0, 2.0]], dtype=torch.bfloat16), 2)
    assert (weights.dtype, picked.dtype, picked.tolist(), weights.tolist()) == (
        torch.float32,
        torch.int64,
        [[1, 2]],
        [[0.5, 0.5]],
    )


def test_route_with_a_cut_off_expert() -> None:
    weights, picked = route(torch.tensor([[-math.inf, 0.0, -math.inf]]), 2)
    assert (picked.tolist(), weights.tolist()) == ([[1, 0]], [[1.0, 0.0]])


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("shift", [0, 2])
def test_the_order_is_what_lists_give(multiple: int, shift: int) -> None:
    """shift: as many experts, at both ends, belong to others."""
    picked, count = chosen(7, 8, 3) - shift, 8 - 2 * shift
    order, inverse, offsets = expert_order(picked, count, multiple=multiple)
    rows: list[int] = []
    starts = [0]
    for expert in range(count):
        rows += [place for place, found in enumerate(picked.flatten().tolist()) if found == expert]
        rows += [-1] * (-len(rows) % multiple)
        starts.append(len(rows))
    assert offsets.tolist() == starts
    assert order.tolist() == rows + [-1] * (num_rows(21, count, multiple) - len(rows))
    places = {place: row for row, place in enumerate(rows) if place >= 0}
    assert inverse.flatten().tolist() == [places.get(place, -1) for place in range(21)]
    assert {order.dtype, inverse.dtype, offsets.dtype} == {torch.int32}


def test_rows_go_to_their_experts_and_back() -> None:
    order, inverse, offsets = expert_order(chosen(5, 4, 2), 4)
    x, weights = randn(5, 3).requires_grad_(), randn(5, 2, seed=2).requires_grad_()
    y = expert_permute(x, order, inverse)
    same(y, x.repeat_interleave(2, dim=0)[order.long()])
    same(expert_unpermute(y, order, inverse, weights), x * weights.sum(1, keepdim=True))
    assert int(offsets[-1]) == 10
    assert torch.autograd.gradcheck(lambda x: expert_permute(x, order, inverse), (x,))
    assert torch.autograd.gradcheck(
        lambda y, w: expert_unpermute(y, order, inverse, w), (randn(10, 3).requires_grad_(), weights)
    )


def test_grouped_matmul_is_torchs() -> None:
    x, weights = randn(6, 16).float().requires_grad_(), randn(3, 16, 8, seed=1).float().requires_grad_()
    offsets = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    ours, theirs = grouped_matmul(x, weights, offsets), F.grouped_mm(x, weights, offs=offsets[1:])
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, weights)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_of_no_expert_are_zero() -> None:
    y = grouped_matmul(randn(3, 2), randn(1, 2, 2), torch.tensor([0, 1], dtype=torch.int32))
    assert torch.equal(y[1:], torch.zeros(2, 2, dtype=torch.float64))


def test_the_layer_is_its_formula_one_token_at_a_time() -> None:
    """One of the six experts chosen from belongs to another rank, at either end."""
    x, weights = randn(5, 4).requires_grad_(), randn(5, 2, seed=1).requires_grad_()
    gate_up, down = randn(4, 6, 4, seed=2).requires_grad_(), randn(4, 4, 3, seed=3).requires_grad_()
    picked = chosen(5, 6, 2) - 1
    wanted = []
    for n in range(5):
        total = torch.zeros(4, dtype=torch.float64)
        for k, expert in enumerate(picked[n].tolist()):
            if 0 <= expert < 4:
                gate, up = gate_up[expert, :3] @ x[n], gate_up[expert, 3:] @ x[n]
                total = total + weights[n, k] * (down[expert] @ (gate / (1 + (-gate).exp()) * up))
        wanted.append(total)
    inputs = (x, gate_up, down, weights)
    ours, theirs = experts(x, gate_up, down, picked, weights), torch.stack(wanted)
    same(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (ours, theirs)), strict=True):
        same(a, b)
