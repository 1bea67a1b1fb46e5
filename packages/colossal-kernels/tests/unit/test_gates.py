"""Gated activations in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from colossal_core.ops import swiglu as reference
from colossal_core.testing import OpSuite
from colossal_kernels.gates.packed import packed_geglu, packed_swiglu
from colossal_kernels.gates.two import geglu, swiglu
from colossal_kernels.table import implementations

FOUND = {found.op: found for found in implementations()}
REGISTRATION = ("test_schema", "test_autograd_registration", "test_faketensor")
GPT_OSS = {"interleaved": True, "alpha": 1.702, "limit": 0.7, "shift": 1.0}


class TestSwiglu(OpSuite):
    implementation = FOUND["swiglu"]
    dtypes = ("float32", "float16")


class TestGeglu(OpSuite):
    implementation = FOUND["geglu"]
    dtypes = ("float32", "float16")


class TestPackedSwiglu(OpSuite):
    implementation = FOUND["packed_swiglu"]
    dtypes = ("float32", "float16")


class TestPackedGeglu(OpSuite):
    implementation = FOUND["packed_geglu"]
    dtypes = ("float32", "float16")


def close(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [7, 300])
@pytest.mark.parametrize("overwrite", [False, True])
def test_weights_have_gradients(width: int, overwrite: bool) -> None:
    leaves = [torch.randn(3, width, requires_grad=True), torch.randn(3, width, requires_grad=True)]
    leaves.append(torch.rand(3, requires_grad=True))
    gate, up, weights = 2 * leaves[0], 2 * leaves[1], 2 * leaves[2]
    wanted = reference.swiglu(gate, up, weights=weights)
    theirs = torch.autograd.grad(wanted.square().sum(), leaves, retain_graph=True)
    found = swiglu(gate, up, weights=weights, overwrite=overwrite)
    close([found], [wanted])
    for ours, truth in zip(torch.autograd.grad(found.square().sum(), leaves), theirs, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keywords", [{}, {"interleaved": True}, GPT_OSS])
@pytest.mark.parametrize("overwrite", [False, True])
def test_packed_weights_have_gradients(keywords: dict[str, Any], overwrite: bool) -> None:
    x, weights = torch.randn(3, 5, 14, requires_grad=True), torch.rand(3, 5, requires_grad=True)
    gate_up = (2 * x).transpose(0, 1)
    wanted = reference.packed_swiglu(gate_up, weights=weights.t(), **keywords)
    theirs = torch.autograd.grad(wanted.square().sum(), (x, weights), retain_graph=True)
    found = packed_swiglu(gate_up, weights=weights.t(), overwrite=overwrite, **keywords)
    close([found], [wanted])
    for ours, truth in zip(torch.autograd.grad(found.square().sum(), (x, weights)), theirs, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_overwriting_puts_gradients_where_the_arguments_were(approximate: Any) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    gate, up = 1 * x, 2 * x
    gate_up = torch.cat([gate, up], -1)
    calls = (
        (geglu(gate, up, approximate=approximate, overwrite=True), (gate, up)),
        (packed_geglu(gate_up, approximate=approximate, overwrite=True), (gate_up,)),
    )
    for y, given in calls:
        addresses = [tensor.data_ptr() for tensor in given]
        grads = torch.autograd.grad(y, given, torch.ones_like(y), retain_graph=True)
        assert [grad.data_ptr() for grad in grads] == addresses
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            torch.autograd.grad(y, given, torch.ones_like(y))


def test_a_leaf_is_not_overwritten() -> None:
    gate, up = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    before = gate.detach().clone()
    swiglu(gate, up, overwrite=True).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(gate.detach(), before)


def test_unlike_layouts_are_overwritten_too() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    gate, up = 2 * x, torch.cat([x, x], -1)[:, :6]
    theirs = torch.autograd.grad(reference.swiglu(gate, up).sum(), x, retain_graph=True)
    close(torch.autograd.grad(swiglu(gate, up, overwrite=True).sum(), x), theirs)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy tells the interpreter; a GPU is silent
def test_large_gates_give_no_nan() -> None:
    gate = torch.tensor([[-1e4, -200.0, 200.0, 1e4]], requires_grad=True)
    up = torch.ones(1, 4)
    for y in (swiglu(gate, up), geglu(gate, up), geglu(gate, up, approximate="tanh")):
        (grad,) = torch.autograd.grad(y.sum(), gate)
        assert torch.equal(grad, torch.tensor([[0.0, 0.0, 1.0, 1.0]])) and torch.equal(y, gate.clamp(min=0))


@pytest.mark.parametrize("way", ["compiled", "recomputed"])
def test_overwriting_in_compiled_and_in_recomputed_code(way: str) -> None:
    def block(x: torch.Tensor) -> torch.Tensor:
        return swiglu(2 * x, 3 * x, overwrite=True) + packed_geglu(torch.cat([x, x], -1), overwrite=True)

    x = torch.randn(3, 8, requires_grad=True)
    wanted = reference.swiglu(2 * x, 3 * x) + reference.packed_geglu(torch.cat([x, x], -1))
    theirs = torch.autograd.grad(wanted.square().sum(), x)
    if way == "compiled":
        found = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    else:
        found = checkpoint(block, x, use_reentrant=False)
    close([found], [wanted])
    close(torch.autograd.grad(found.square().sum(), x), theirs)


def test_torch_knows_the_operators() -> None:
    gate, up = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    gate_up, weights = torch.randn(3, 14, requires_grad=True), torch.rand(3, requires_grad=True)
    grad, still = torch.randn(3, 7), [t.detach().clone() for t in (gate, up, gate_up, weights)]
    names = torch.ops.colossal_kernels
    how = ("silu", True, 1.5, 2.0, 1.0)
    calls = [
        (names.gated.default, (gate, up, weights, "gelu", False)),
        (names.gated.default, (gate, up, None, "silu", False)),
        (names.packed_gated.default, (gate_up, weights, *how, False)),
        (names.gated_backward.default, (grad, still[0], still[1], still[3], "gelu_tanh")),
        (names.gated_backward_.default, (grad, still[0], still[1], None, "silu")),
        (names.packed_gated_backward.default, (grad, still[2], None, *how)),
        (names.packed_gated_backward_.default, (grad, still[2], still[3], *how)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=REGISTRATION)
