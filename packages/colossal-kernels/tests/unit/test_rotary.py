"""Rotary embedding in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from colossal_core.ops import rotary as reference
from colossal_core.testing import OpSuite
from colossal_kernels.positions import rotary as module
from colossal_kernels.positions.rotary import rotary
from colossal_kernels.table import implementations

REGISTRATION = ("test_schema", "test_autograd_registration", "test_faketensor")


class TestRotary(OpSuite):
    implementation = next(found for found in implementations() if found.op == "rotary")
    dtypes = ("float32", "float16")


def angles_of(length: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(1, length, pairs).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def projected(heads: int, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and result of a projection, as models pass it on: [B, H, L, D] over memory of [B, L, H, D]."""
    x = torch.randn(2, 5, heads * width, requires_grad=True)
    return x, (2.0 * x).view(2, 5, heads, width).transpose(1, 2)


@pytest.mark.parametrize("keywords", [{}, {"interleaved": True}])
@pytest.mark.parametrize("pairs", [4, 3])
def test_overwriting_gives_the_same_in_the_memory_of_queries_and_keys(keywords: dict[str, Any], pairs: int) -> None:
    cos, sin = angles_of(5, pairs)
    (x, q), (y, k) = projected(3), projected(2)
    wanted = reference.rotary(q.clone(), k.clone(), cos, sin, **keywords)
    ends = [torch.randn_like(turned) for turned in wanted]
    gradients = torch.autograd.grad(wanted, (x, y), ends, retain_graph=True)
    found = rotary(q, k, cos, sin, overwrite=True, **keywords)
    assert [turned.data_ptr() for turned in found] == [q.data_ptr(), k.data_ptr()]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    given = [end.clone() for end in ends]
    for a, b in zip(torch.autograd.grad(found, (x, y), given), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not torch.equal(given[0], ends[0]), "the gradient's memory was used"


def test_who_saved_overwritten_queries_is_told() -> None:
    cos, sin = angles_of(5, 4)
    (_, q), (_, k) = projected(3), projected(2)
    squares = q * q
    rotary(q, k, cos, sin, overwrite=True)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        squares.sum().backward()  # type: ignore[no-untyped-call]


def test_what_autograd_forbids_to_change_is_left_alone() -> None:
    cos, sin = angles_of(5, 4)
    q, k = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 1, 1, 8).expand(1, 2, 5, 8)
    before = q.detach().clone()
    found = rotary(q, k, cos, sin, overwrite=True)
    wanted = reference.rotary(q, k, cos, sin)
    assert torch.equal(q, before)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("asked", [0, 1])
def test_the_gradient_of_one_result_alone(asked: int, overwrite: bool) -> None:
    cos, sin = angles_of(5, 4)
    pairs = (projected(3), projected(2))
    wanted = reference.rotary(pairs[0][1].clone(), pairs[1][1].clone(), cos, sin)[asked]
    (theirs,) = torch.autograd.grad(wanted.square().sum(), pairs[asked][0], retain_graph=True)
    found = rotary(pairs[0][1], pairs[1][1], cos, sin, overwrite=overwrite)[asked]
    (ours,) = torch.autograd.grad(found.square().sum(), pairs[asked][0])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_results_lie_in_memory_as_the_arguments_do() -> None:
    (_, q), (_, k) = projected(3), projected(2)
    found = rotary(q, k, *angles_of(5, 4))
    assert [turned.stride() for turned in found] == [q.stride(), k.stride()]


def test_features_that_are_no_neighbours() -> None:
    """Queries [B, H, L, D] over memory of [B, H, D, L], gradients that are one expanded number."""
    cos, sin = angles_of(5, 4)
    q, k = torch.randn(1, 2, 8, 5, requires_grad=True), torch.randn(1, 2, 5, 8, requires_grad=True)
    found, wanted = (turn(q.mT, k, cos, sin) for turn in (rotary, reference.rotary))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(found[0].sum() + found[1].sum(), (q, k)) for found in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rotating_back_gives_the_start_again() -> None:
    cos, sin = angles_of(5, 4)
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
    for a, b in zip(rotary(*rotary(q, k, cos, sin), cos, -sin), (q, k), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_more_heads_than_a_tile_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_PAIRS", 8)
    q, k = torch.randn(1, 5, 3, 8), torch.randn(1, 3, 3, 8)
    cos, sin = angles_of(3, 4)
    for a, b in zip(rotary(q, k, cos, sin), reference.rotary(q, k, cos, sin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["compiled", "recomputed"])
def test_overwriting_in_compiled_and_in_recomputed_code(way: str) -> None:
    cos, sin = angles_of(5, 4)

    def block(x: torch.Tensor) -> torch.Tensor:
        q, k = rotary(2 * x, 3 * x, cos, sin, overwrite=True)
        return q * k

    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    q, k = reference.rotary(2 * x, 3 * x, cos, sin)
    wanted = torch.autograd.grad((q * k).square().sum(), x)
    if way == "compiled":
        found = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    else:
        found = checkpoint(block, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x), wanted, rtol=1e-4, atol=1e-4)


def test_torch_knows_the_operators() -> None:
    cos, sin = angles_of(5, 3)
    (_, q), (_, k) = projected(3), projected(2)
    names = torch.ops.colossal_kernels
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    torch.library.opcheck(names.rotary.default, (q, k, cos, sin, 3, 1, True, False, False), test_utils=REGISTRATION)
    apart = (q.detach().mT.contiguous().mT, k.detach(), cos, sin, 3, 1, True, False, False)
    torch.library.opcheck(names.rotary.default, apart, test_utils=REGISTRATION)
    plain = (q.detach().clone(), k.detach().clone(), cos, sin, 3, 1, False, True)
    torch.library.opcheck(names.rotary_.default, plain, test_utils=REGISTRATION)
