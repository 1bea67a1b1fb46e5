"""RMS normalisation, alone and after the residual addition, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from colossal_core.ops import norms as reference
from colossal_core.testing import OpSuite
from colossal_kernels.norms import backward, forward, rms_norm_fp8
from colossal_kernels.norms.config import NormConfig
from colossal_kernels.norms.rms_norm import add_rms_norm, rms_norm
from colossal_kernels.table import implementations

FOUND = {found.op: found for found in implementations()}
REGISTRATION = ("test_schema", "test_autograd_registration", "test_faketensor")


class TestRmsNorm(OpSuite):
    implementation = FOUND["rms_norm"]
    dtypes = ("float32", "float16")


class TestAddRmsNorm(OpSuite):
    implementation = FOUND["add_rms_norm"]
    dtypes = ("float32", "float16")


class TestRmsNormFp8(OpSuite):
    implementation = FOUND["rms_norm_fp8"]
    dtypes = ("float32", "float16")


WIDE = (
    NormConfig(rows=2, block=32, warps=1, programs=2),
    NormConfig(rows=1, block=128, warps=1, programs=2, twice=True),
)


@pytest.fixture(params=WIDE, ids=["in chunks", "read twice"])
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 75 are too wide for registers, so that the kernels for wide rows run on small tensors."""
    monkeypatch.setattr(forward, "forward_config", lambda *sizes: NormConfig(1, 32, 1))
    monkeypatch.setattr(backward, "backward_config", lambda *sizes: request.param)


def values_and_gradients(function: Callable[..., Any], arguments: list[Any], **keywords: Any) -> list[torch.Tensor]:
    inputs = [value.detach().clone().requires_grad_() for value in arguments if isinstance(value, torch.Tensor)]
    remaining = iter(inputs)
    returned = function(*(next(remaining) if isinstance(v, torch.Tensor) else v for v in arguments), **keywords)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("rows", [3, 5])
def test_rows_too_wide_for_registers(rows: int) -> None:
    x, residual, weight = torch.randn(rows, 75), torch.randn(rows, 75), torch.randn(75)
    Pair = tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor]]
    pairs: list[Pair] = [(rms_norm, reference.rms_norm, [x]), (add_rms_norm, reference.add_rms_norm, [x, residual])]
    for ours, theirs, tensors in pairs:
        found = values_and_gradients(ours, [*tensors, weight, 1e-6], offset=1.0)
        wanted = values_and_gradients(theirs, [v.double() for v in [*tensors, weight]] + [1e-6], offset=1.0)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


def test_the_sum_alone_has_the_gradient_of_an_addition() -> None:
    x, residual, weight = (torch.randn(3, 4, requires_grad=True) for _ in range(3))
    _, total = add_rms_norm(x, residual, weight[0], 1e-6)
    grads = torch.autograd.grad(total, (x, residual, weight), torch.ones(3, 4), allow_unused=True)
    assert torch.equal(grads[0], torch.ones(3, 4)) and torch.equal(grads[1], torch.ones(3, 4)) and grads[2] is None


def test_the_sum_is_exactly_torch_s() -> None:
    x, residual = torch.randn(5, 7).half(), torch.randn(5, 7).half()
    assert torch.equal(add_rms_norm(x, residual, None, 1e-6)[1], x + residual)


def test_a_second_run_gives_the_same_bits() -> None:
    x, weight = torch.randn(70, 33, dtype=torch.float32), torch.randn(33)
    first, second = (values_and_gradients(rms_norm, [x, weight, 1e-6]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_eight_bits_are_the_norm_times_its_scale() -> None:
    x, weight = torch.randn(6, 64), torch.randn(64)
    y, scale = rms_norm_fp8.rms_norm_fp8(x, weight, 1e-6)
    norm = reference.rms_norm(x, weight, 1e-6)
    assert scale.shape == (6, 1) and torch.equal(y.float().abs().amax(-1), torch.full((6,), 448.0))
    torch.testing.assert_close(y.float() * scale, norm, rtol=2**-4, atol=float(scale.max()) * 2**-9)
    assert not y.requires_grad and not rms_norm_fp8.rms_norm_fp8(x.requires_grad_(), weight, 1e-6)[0].requires_grad


@pytest.mark.parametrize("size", [1e-30, 1e-37, 1e30])
def test_eight_bits_of_tiny_and_large_weights(size: float) -> None:
    """One factor a row must neither overflow nor lose the scale."""
    x, weight = torch.randn(3, 16), torch.linspace(0.5, 2.0, 16)
    y, scale = rms_norm_fp8.rms_norm_fp8(x, weight * size, 1e-6)
    same, once = rms_norm_fp8.rms_norm_fp8(x, weight, 1e-6)
    torch.testing.assert_close(y.float(), same.float(), rtol=2**-3, atol=2**-9)
    torch.testing.assert_close(scale.double() / size, once.double(), rtol=1e-4, atol=0.0)


def test_torch_knows_the_operators() -> None:
    x, weight = torch.randn(3, 7, requires_grad=True), torch.randn(7, requires_grad=True)
    names = torch.ops.colossal_kernels
    y, rstd = names.rms_norm.default(x, weight, 1e-6, 0.0)
    calls = [
        (names.rms_norm.default, (x, weight, 1e-6, 0.0)),
        (names.rms_norm.default, (x, None, 1e-6, 1.0)),
        (names.add_rms_norm.default, (x, x.detach().clone().requires_grad_(), weight, 1e-6, 1.0)),
        (names.rms_norm_backward.default, (y.detach(), y.detach(), x.detach(), weight.detach(), rstd, 0.0)),
        (names.rms_norm_backward.default, (y.detach(), None, x.detach(), None, rstd, 0.0)),
        (names.rms_norm_fp8.default, (x.detach(), weight.detach(), 1e-6, 0.0)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=REGISTRATION)


@pytest.mark.parametrize("weight", [torch.randn(16)[::2], torch.randn(1).expand(8), torch.randn(1)])
def test_weights_of_any_layout(weight: torch.Tensor) -> None:
    x = torch.randn(3, 8)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    found, wanted = (add(x, x, weight, 1e-6) for add in (add_rms_norm, reference.add_rms_norm))
    torch.testing.assert_close(found, wanted)
    codes, scale = rms_norm_fp8.rms_norm_fp8(x, weight, 1e-6)
    same_codes, same_scale = reference.rms_norm_fp8(x, weight, 1e-6)
    assert torch.equal(codes.float(), same_codes.float()) and torch.equal(scale, same_scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_a_kernel_does_not_take_goes_to_the_reference(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, dtype=torch.float64).to(dtype)
    mixed = torch.ones(4, dtype=torch.float64)
    assert torch.equal(rms_norm(x, mixed, 1e-6), reference.rms_norm(x, mixed, 1e-6))
    y, total = add_rms_norm(x, x.float(), None, 1e-6)
    assert total.dtype == torch.promote_types(dtype, torch.float32) == y.dtype


def test_a_gradient_of_a_gradient_is_refused() -> None:
    """The backward kernel has no gradient of its own: what autograd would make of it is wrong."""
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    y = rms_norm(x, weight, 1e-6)
    with pytest.raises(RuntimeError) as raised:
        torch.autograd.grad(y.sum(), x, create_graph=True)
    reason = "the kernel rms_norm has no second derivative (create_graph=True)"
    assert str(raised.value) == f"{reason}: choose the provider `reference` for its op"
