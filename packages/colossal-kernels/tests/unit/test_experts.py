"""Routing, sorting and moving rows by expert, in the interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from colossal_core.difference import relative_difference
from colossal_core.ops import OpImplementation
from colossal_core.ops import experts as reference
from colossal_core.testing import OpSuite
from colossal_kernels.experts import grouped_matmul as grouped_module
from colossal_kernels.experts.order import expert_order
from colossal_kernels.experts.route import route
from colossal_kernels.experts.rows import expert_permute, expert_unpermute
from colossal_kernels.table import implementations

OPERATOR_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")


def ours(op: str) -> OpImplementation:
    return next(found for found in implementations() if found.op == op and found.fits("cpu", "float32"))


class TestRoute(OpSuite):
    implementation = ours("route")
    dtypes = ("float32", "float16")


class TestExpertOrder(OpSuite):
    implementation = ours("expert_order")
    dtypes = ("float32",)


class TestExpertPermute(OpSuite):
    implementation = ours("expert_permute")
    dtypes = ("float32", "float16")


class TestExpertUnpermute(OpSuite):
    implementation = ours("expert_unpermute")
    dtypes = ("float32", "float16")


def chosen(num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered"
)  # the interpreter's NumPy says what it makes of infinities
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_infinite_and_undefined_logits_are_chosen_as_the_reference_does(normalize: bool) -> None:
    inf, nan = math.inf, math.nan
    rows = [
        [0.0, -0.0, 0.0, -1.0, 0.0],
        [-1.0, -2.0, -inf, -0.5, -3.0],
        [-inf, -inf, 1.0, -inf, -inf],
        [1.0, nan, 3.0, -nan, 2.0],
        [5.0, inf, -inf, 4.0, 3.0],
        [-1e-40, 1e-40, 0.0, -1e30, 1e30],
    ]
    logits = torch.tensor(rows)
    weights, experts = route(logits, 3, normalize=normalize)
    wanted_weights, wanted = reference.route(logits, 3, normalize=normalize)
    assert torch.equal(experts, wanted)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-6, atol=0.0, equal_nan=True)


def test_an_expert_that_is_not_chosen_has_no_gradient_where_weights_are_normalized() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights, experts = route(logits, 2)
    (gradient,) = torch.autograd.grad((weights * torch.tensor([1.0, -2.0])).sum(), logits)
    untouched = torch.ones(4, 9, dtype=torch.bool).scatter_(1, experts, False)
    assert torch.equal(gradient[untouched], torch.zeros(28))
    assert bool((gradient[~untouched] != 0).all())


@pytest.mark.parametrize("multiple", [1, 8])
def test_permuting_and_unpermuting_gives_the_same_bits(multiple: int) -> None:
    order, inverse, offsets = expert_order(chosen(13, 6, 4), 6, multiple=multiple)
    x = torch.randn(13, 33, generator=torch.Generator().manual_seed(1))
    rows = expert_permute(x, order, inverse)
    assert torch.equal(expert_unpermute(rows, order, inverse, torch.full((13, 4), 0.25)), x)
    assert torch.equal(rows[order < 0], torch.zeros(int((order < 0).sum()), 33))
    assert all(stop % multiple == 0 for stop in offsets.tolist())
    held = order[order >= 0].to(torch.int64)
    assert torch.equal(held.sort().values, torch.arange(52))
    assert torch.equal(inverse.view(-1)[held].to(torch.int64), (order >= 0).nonzero().flatten())


def test_choices_keep_their_order_within_an_expert() -> None:
    experts = torch.randint(3, (150, 2), generator=torch.Generator().manual_seed(2))
    order, _, offsets = expert_order(experts, 3)
    for expert in range(3):
        mine = order[int(offsets[expert]) : int(offsets[expert + 1])].to(torch.int64)
        assert torch.equal(mine, (experts.view(-1) == expert).nonzero().flatten())


def test_a_choice_without_a_row_has_a_zero_gradient() -> None:
    experts = torch.tensor([[0, 5], [5, 5], [1, 0]])
    order, inverse, _ = expert_order(experts, 2)
    y = torch.full((6, 4), math.nan)
    y[:3] = 1.0
    y.requires_grad_()
    weights = torch.ones(3, 2, requires_grad=True)
    x = expert_unpermute(y, order, inverse, weights)
    assert x.tolist() == [[1.0] * 4, [0.0] * 4, [2.0] * 4]
    grad_y, grad_weights = torch.autograd.grad(x.sum(), [y, weights])
    assert grad_weights.tolist() == [[4.0, 0.0], [0.0, 0.0], [4.0, 4.0]]
    assert torch.equal(grad_y[3:], torch.zeros(3, 4))


def test_results_are_the_same_bits_every_time() -> None:
    experts = chosen(40, 8, 3)
    order, inverse, offsets = expert_order(experts, 8)
    y, weights = torch.randn(120, 24), torch.randn(40, 3)
    first, second = (expert_unpermute(y, order, inverse, weights) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(expert_order(experts, 8), (order, inverse, offsets), strict=True))


def test_rows_may_lie_more_than_two_to_the_31st_elements_apart() -> None:
    """4 GiB are addressed, two pages of them touched."""
    stride = (1 << 31) + 4
    memory = torch.empty(stride + 4, dtype=torch.float16)
    x = memory.as_strided((2, 4), (stride, 1))
    x.copy_(torch.arange(8.0).view(2, 4))
    order, inverse, _ = expert_order(torch.tensor([[1], [0]]), 2)
    assert expert_permute(x, order, inverse).tolist() == [[4.0, 5.0, 6.0, 7.0], [0.0, 1.0, 2.0, 3.0]]
    assert expert_unpermute(x, order, inverse).tolist() == [[4.0, 5.0, 6.0, 7.0], [0.0, 1.0, 2.0, 3.0]]
    assert route(x, 1)[1].tolist() == [[3], [3]]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["plain", "parts of odd rows", "one row expanded"])
def test_products_take_rows_and_gradients_of_any_strides(
    layout: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's kernel wants rows at multiples of 16 bytes, on the CPU too. The sum's gradient is one number expanded."""
    monkeypatch.setattr(grouped_module, "takes_grouped", lambda *tensors: True)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 17, generator=generator).bfloat16()
    x = {
        "plain": wide[:, :16].clone(),
        "parts of odd rows": wide[:, :16],
        "one row expanded": wide[:1, :16].expand(6, 16),
    }
    weights = torch.randn(3, 16, 8, generator=generator).bfloat16()
    if transposed:
        weights = weights.transpose(1, 2).contiguous().transpose(1, 2)
    offsets = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    given = x[layout].requires_grad_(), weights.requires_grad_()
    results = []
    for function in (grouped_module.grouped_matmul, reference.grouped_matmul):
        y = function(*given, offsets)
        results.append((y, *torch.autograd.grad(y.sum(), given)))
    for found, wanted in zip(*results, strict=True):
        assert relative_difference(found, wanted) <= 2.0**-8
    assert results[0][2].stride() == weights.stride()


def operators() -> list[tuple[Any, tuple[Any, ...]]]:
    experts = chosen(5, 4, 2)
    order, inverse, _ = expert_order(experts, 4)
    logits = torch.randn(3, 5)
    weights, picked = route(logits, 2)
    ops = torch.ops.colossal_kernels
    x, y, scales = torch.randn(5, 8), torch.randn(10, 8), torch.randn(5, 2)
    rows, matrices = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((10, 8), (4, 8, 16)))
    _, _, offsets = expert_order(experts, 4)
    return [
        (ops.route.default, (logits.requires_grad_(), 2, True)),
        (ops.route_backward.default, (weights, logits.detach(), weights, picked, torch.zeros(3), False)),
        (ops.expert_order.default, (experts, 4, 8)),
        (ops.expert_permute.default, (x.requires_grad_(), order, inverse)),
        (ops.expert_unpermute.default, (y.requires_grad_(), order, inverse, scales.requires_grad_())),
        (ops.expert_unpermute.default, (y, order, inverse, None)),
        (ops.expert_unpermute_backward.default, (x.detach(), y.detach(), order, inverse, scales.detach())),
        (ops.grouped_matmul.default, (rows, matrices, offsets)),
    ]


@pytest.mark.parametrize("index", range(8))
def test_torch_knows_the_operators(index: int) -> None:
    operator, arguments = operators()[index]
    torch.library.opcheck(operator, arguments, test_utils=OPERATOR_TESTS)
