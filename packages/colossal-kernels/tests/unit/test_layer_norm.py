"""Layer normalisation, alone and after the residual addition, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from colossal_core.ops import norms as reference
from colossal_core.testing import OpSuite
from colossal_kernels.norms import backward, forward
from colossal_kernels.norms.config import NormConfig
from colossal_kernels.norms.layer_norm import add_layer_norm, layer_norm
from colossal_kernels.table import implementations

FOUND = {found.op: found for found in implementations()}


class TestLayerNorm(OpSuite):
    implementation = FOUND["layer_norm"]
    dtypes = ("float32", "float16")


class TestAddLayerNorm(OpSuite):
    implementation = FOUND["add_layer_norm"]
    dtypes = ("float32", "float16")


@pytest.mark.parametrize("rows", [3, 5])
def test_rows_too_wide_for_registers(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, tall = NormConfig(1, 32, 1), NormConfig(rows=2, block=32, warps=1, programs=2)
    monkeypatch.setattr(forward, "forward_config", lambda *sizes: narrow)
    monkeypatch.setattr(backward, "backward_config", lambda *sizes: tall)
    x, residual, weight, bias = (torch.randn(rows, 75, requires_grad=True) for _ in range(4))
    inputs = (x, residual, weight, bias)
    found = add_layer_norm(x, residual, weight[0], bias[0], 1e-5, offset=1.0)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = reference.add_layer_norm(wide[0], wide[1], wide[2][0], wide[3][0], 1e-5, offset=1.0)
    ends = [torch.linspace(-1, 1, x.numel()).view_as(x), torch.ones_like(x)]
    ours = [*found, *torch.autograd.grad(found, inputs, ends)]
    theirs = [*wanted, *torch.autograd.grad(wanted, wide, [end.double() for end in ends])]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_a_large_mean_does_not_cost_digits() -> None:
    x = torch.randn(4, 256) + 1000.0
    y = layer_norm(x, None, None, 1e-5)
    truth = reference.layer_norm(x.double(), None, None, 1e-5)
    theirs = reference.layer_norm(x, None, None, 1e-5)
    assert (y - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-6


def test_a_weight_and_a_bias_that_are_not_contiguous() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(16)[::2], torch.randn(1).expand(8)
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5))
    ours, theirs = (add(x, x, weight, bias, 1e-5) for add in (add_layer_norm, reference.add_layer_norm))
    torch.testing.assert_close(ours, theirs)


def test_torch_knows_the_operators() -> None:
    x, weight, bias = torch.randn(3, 7, requires_grad=True), torch.randn(7, requires_grad=True), torch.randn(7)
    names = torch.ops.colossal_kernels
    y, mean, rstd = names.layer_norm.default(x, weight, bias, 1e-6, 0.0)
    still = [tensor.detach() for tensor in (y, x, weight, mean, rstd)]
    calls = [
        (names.layer_norm.default, (x, weight, bias, 1e-6, 0.0)),
        (names.layer_norm.default, (x, None, None, 1e-6, 1.0)),
        (names.add_layer_norm.default, (x, x.detach().clone().requires_grad_(), weight, None, 1e-6, 1.0)),
        (names.layer_norm_backward.default, (still[0], still[0], still[1], still[2], bias, *still[3:], 0.0)),
        (names.layer_norm_backward.default, (still[0], None, still[1], None, None, *still[3:], 0.0)),
    ]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=tests)
