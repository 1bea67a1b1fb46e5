"""A layer of experts whole, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colossal_core.testing import OpSuite
from colossal_core.testing.op_cases import op_cases
from colossal_kernels.experts.layer import experts
from colossal_kernels.table import implementations

OPERATOR_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")


class TestExperts(OpSuite):
    implementation = next(
        found for found in implementations() if found.op == "experts" and found.fits("cpu", "float32")
    )
    dtypes = ("float32", "float16")


def layer(*learned: int) -> list[torch.Tensor]:
    """The arguments of the first case; those of `learned` indices want a gradient."""
    arguments = list(op_cases("experts", torch.float32)[0].arguments)
    return [tensor.requires_grad_(index in learned) for index, tensor in enumerate(arguments)]


@pytest.mark.parametrize("learned", [(0,), (1,), (2,), (4,), (0, 4), (1, 2)])
def test_only_the_gradients_that_are_asked_for_are_made(learned: tuple[int, ...]) -> None:
    whole = layer(0, 1, 2, 4)
    wanted = torch.autograd.grad(experts(*whole).square().sum(), [whole[index] for index in learned])
    some = layer(*learned)
    experts(*some).square().sum().backward()  # type: ignore[no-untyped-call]
    assert [index for index, tensor in enumerate(some) if tensor.grad is not None] == list(learned)
    for index, gradient in zip(learned, wanted, strict=True):
        found = some[index].grad
        assert found is not None
        assert torch.equal(found, gradient)


def test_a_graph_can_be_gone_through_twice() -> None:
    """Nothing that was kept is written over."""
    arguments = layer(0, 1, 2, 4)
    total = experts(*arguments).square().sum()
    inputs = [arguments[index] for index in (0, 1, 2, 4)]
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(total, inputs), strict=True))


def test_an_expert_that_nobody_chose_has_a_zero_gradient() -> None:
    arguments = layer(1, 2)
    arguments[3] = arguments[3] % 3
    gradients = torch.autograd.grad(experts(*arguments).sum(), arguments[1:3])
    assert all(torch.equal(gradient[3], torch.zeros_like(gradient[3])) for gradient in gradients)
    assert all(bool(gradient[:3].any()) for gradient in gradients)


def operators() -> list[tuple[Any, tuple[Any, ...]]]:
    x, gate_up, down, chosen, weights = layer(0, 1, 2, 4)
    ops = torch.ops.colossal_kernels
    with torch.no_grad():
        y, *kept = ops.experts.default(x, gate_up, down, chosen, weights)
        packed, order, *_ = kept
        h = ops.expert_gate.default(packed, weights, order)
    given = [tensor.detach() for tensor in (x, gate_up, down, weights)]
    return [
        (ops.experts.default, (x, gate_up, down, chosen, weights)),
        (ops.experts_backward.default, (y, *given, *kept, [True, False, True])),
        (ops.expert_gate.default, (packed, weights.detach(), order)),
        (ops.expert_gate_backward.default, (h, packed, weights.detach(), order)),
    ]


@pytest.mark.parametrize("index", range(4))
def test_torch_knows_the_operators(index: int) -> None:
    operator, arguments = operators()[index]
    torch.library.opcheck(operator, arguments, test_utils=OPERATOR_TESTS)
