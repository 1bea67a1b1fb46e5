"""A layer of experts whole, in the interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from colossal_core.difference import relative_difference
from colossal_core.ops import experts as reference
from colossal_core.testing import OpSuite
from colossal_core.testing.op_cases import OpCase, op_cases
from colossal_kernels.experts import gathered_products
from colossal_kernels.experts import layer as layer_module
from colossal_kernels.experts.layer import experts
from colossal_kernels.experts.order import expert_order
from colossal_kernels.experts.rows import expert_permute
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


@pytest.mark.parametrize("case", op_cases("experts", torch.float16), ids=lambda case: str(case.name))
def test_products_that_gather_give_the_same(case: OpCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rounding of float16, of which the sums are made in float32 by both."""
    tiles = {"ROWS_TILE": (16, 16, 16), "OUTER_TILE": (16, 16, 16), "TILES": 4}
    for name, value in tiles.items():
        monkeypatch.setattr(gathered_products, name, value)
    inputs = [tensor.requires_grad_() for tensor in case.arguments if tensor.is_floating_point()]
    results = []
    for gathered in ((), *((name,) for name in layer_module.PRODUCTS), layer_module.PRODUCTS):
        monkeypatch.setattr(layer_module, "GATHERED", gathered)
        y = experts(*case.arguments)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), inputs)))
    for plain, *others in zip(*results, strict=True):
        assert all(relative_difference(found, plain) <= 2e-3 for found in others)


def test_products_gather_the_rows_of_many_tiles() -> None:
    """Experts with several tiles of rows, with one, and with none, in odd sizes."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(3, (150, 2), generator=generator) % 2 + torch.randint(2, (150, 2), generator=generator) * 2
    order, inverse, offsets = expert_order(chosen, 5)
    x, weights = (torch.randn(shape, generator=generator).half() for shape in ((150, 70), (5, 70, 33)))
    y = gathered_products.gathered_rows(x, weights, order, offsets, 2)
    rows = expert_permute(x, order, inverse)
    wanted = reference.grouped_matmul(rows.double(), weights.double(), offsets)
    assert relative_difference(y, wanted) <= 2.0**-10
    outer = gathered_products.gathered_outer(y, x, None, order, offsets, 2)
    stops = offsets.tolist()
    parts = [y[start:stop].double().t() @ rows[start:stop].double() for start, stop in itertools.pairwise(stops)]
    assert relative_difference(outer, torch.stack(parts)) <= 2.0**-10
    assert torch.equal(outer[4], torch.zeros_like(outer[4]))


def operators() -> list[tuple[Any, tuple[Any, ...]]]:
    x, gate_up, down, chosen, weights = layer(0, 1, 2, 4)
    ops = torch.ops.colossal_kernels
    with torch.no_grad():
        y, *kept = ops.experts.default(x, gate_up, down, chosen, weights)
        packed, order, *_ = kept
        h = ops.expert_gate.default(packed, weights, order)
        _, _, _, offsets = kept
    given = [tensor.detach() for tensor in (x, gate_up, down, weights)]
    columns = gate_up.detach().transpose(1, 2)
    return [
        (ops.gathered_rows.default, (given[0], columns, order, offsets, 2)),
        (ops.gathered_outer.default, (packed, given[0], None, order, offsets, 2)),
        (ops.experts.default, (x, gate_up, down, chosen, weights)),
        (ops.experts_backward.default, (y, *given, *kept, [True, False, True])),
        (ops.expert_gate.default, (packed, weights.detach(), order)),
        (ops.expert_gate_backward.default, (h, packed, weights.detach(), order)),
    ]


@pytest.mark.parametrize("index", range(6))
def test_torch_knows_the_operators(index: int) -> None:
    operator, arguments = operators()[index]
    torch.library.opcheck(operator, arguments, test_utils=OPERATOR_TESTS)
