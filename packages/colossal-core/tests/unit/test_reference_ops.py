"""The reference ops against independent computations in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from colossal_core.ops import OP_NAMES, build_op_table
from colossal_core.ops import cross_entropy as cross_entropy_module
from colossal_core.ops.reference import (
    attention,
    cross_entropy,
    layer_norm,
    linear_cross_entropy,
    reference_ops,
    rms_norm,
    rotary,
    swiglu,
)

HALVES = [torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_every_op_has_a_reference() -> None:
    table = build_op_table(reference_ops(), "cpu", "float64")
    assert table.providers() == dict.fromkeys(OP_NAMES, "reference")
    assert tuple(implementation.op for implementation in reference_ops()) == OP_NAMES


def test_rms_norm_is_its_formula() -> None:
    x, weight = randn(2, 3, 8), randn(8, seed=1)
    same(rms_norm(x, weight, 1e-6), x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight)
    same(rms_norm(x, None, 1e-6), F.rms_norm(x, (8,), eps=1e-6))


@pytest.mark.parametrize("dtype", HALVES)
def test_rms_norm_takes_its_statistic_in_float32(dtype: torch.dtype) -> None:
    x = (300.0 * randn(4, 512)).to(dtype)
    y = rms_norm(x, torch.ones(512, dtype=dtype), 1e-6)
    assert y.dtype == dtype
    exact = rms_norm(x.double(), None, 1e-6)
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_layer_norm_is_its_formula() -> None:
    x, weight, bias = randn(2, 3, 8), randn(8, seed=1), randn(8, seed=2)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    same(layer_norm(x, weight, bias, 1e-5), expected)


@pytest.mark.parametrize("turning", [8, 4])
def test_rotary_is_multiplication_of_complex_numbers(turning: int) -> None:
    q, k = randn(2, 4, 5, 8), randn(2, 2, 5, 8, seed=1)
    angles = randn(1, 5, turning // 2, seed=2)
    doubled = torch.cat((angles, angles), dim=-1)
    for x, turned in zip((q, k), rotary(q, k, doubled.cos(), doubled.sin()), strict=True):
        pairs = torch.complex(x[..., : turning // 2], x[..., turning // 2 : turning])
        expected = pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
        same(turned, torch.cat((expected.real, expected.imag, x[..., turning:]), dim=-1))


def test_rotary_keeps_the_dtype_under_wider_angles() -> None:
    q = randn(1, 1, 3, 4, dtype=torch.bfloat16)
    angles = randn(1, 3, 4, dtype=torch.float32)
    assert [turned.dtype for turned in rotary(q, q, angles.cos(), angles.sin())] == [torch.bfloat16] * 2


def test_swiglu_is_its_formula() -> None:
    gate, up = randn(3, 8), randn(3, 8, seed=1)
    same(swiglu(gate, up), gate / (1 + (-gate).exp()) * up)


def loop_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """The formula, one query of one head at a time. seen: [L, S] bool."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = seen[i].nonzero().flatten()
                if len(keys):
                    scores = torch.stack([scale * torch.dot(q[b, h, i], k[b, h // group, j]) for j in keys])
                    out[b, h, i] = torch.softmax(scores, 0) @ v[b, h // group, keys]
    return out


@pytest.mark.parametrize("kind", ["all", "causal", "causal, fewer queries", "bool", "additive", "causal and bool"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_is_its_formula(kind: str, dtype: torch.dtype) -> None:
    num_queries = 3 if kind == "causal, fewer queries" else 5
    q, k, v = randn(2, 4, num_queries, 8), randn(2, 2, 5, 8, seed=1), randn(2, 2, 5, 8, seed=2)
    seen = torch.ones(num_queries, 5, dtype=torch.bool)
    mask: torch.Tensor | None = None
    if "bool" in kind or kind == "additive":
        mask = torch.rand(num_queries, 5, generator=torch.Generator().manual_seed(3)) < 0.6
        mask[:, 0] = True
        seen &= mask
    if kind == "additive":
        assert mask is not None
        mask = torch.zeros(num_queries, 5, dtype=dtype).masked_fill(~mask, -math.inf)
    if "causal" in kind:
        seen &= torch.arange(num_queries).unsqueeze(1) + 5 - num_queries >= torch.arange(5)
    out = attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, causal="causal" in kind, scaling=0.3)
    assert out.dtype == dtype
    same(out.double(), loop_attention(q, k, v, seen, 0.3), 1e-12 if dtype == torch.float64 else 1e-5)


def test_attention_of_a_query_that_sees_nothing_is_zero_with_finite_gradients() -> None:
    q, k, v = (randn(1, 1, 2, 4, seed=seed).requires_grad_() for seed in range(3))
    out = attention(q, k, v, torch.tensor([[True, True], [False, False]]))
    assert torch.equal(out[0, 0, 1], torch.zeros(4, dtype=torch.float64))
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in (q, k, v))


def test_attention_drops_weights_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q = torch.zeros(1, 1, 64, 4, dtype=torch.float64)
    v = torch.ones(1, 1, 256, 1, dtype=torch.float64)
    out = attention(q, torch.zeros(1, 1, 256, 4, dtype=torch.float64), v, dropout=0.25)
    assert not torch.equal(out, torch.ones_like(out))
    assert abs(float(out.mean()) - 1.0) < 0.02


@pytest.fixture(params=[1, 21, 1 << 24], ids=["chunks of one row", "chunks of three rows", "one chunk"])
def chunk_logits(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    size = int(request.param)
    monkeypatch.setattr(cross_entropy_module, "CHUNK_LOGITS", size)
    return size


@pytest.mark.usefixtures("chunk_logits")
def test_cross_entropy_and_its_gradient_are_torchs_in_float64() -> None:
    logits = randn(2, 4, 7).requires_grad_()
    labels = torch.tensor([[0, 6, -100, 3], [-100, 2, 2, 5]])
    total, count = cross_entropy(logits, labels)
    expected = F.cross_entropy(logits.reshape(-1, 7), labels.reshape(-1), reduction="sum")
    same(total, expected)
    assert (count.dtype, int(count), total.shape) == (torch.int64, 6, ())
    (ours,) = torch.autograd.grad(total / 3, logits)
    (theirs,) = torch.autograd.grad(expected / 3, logits)
    same(ours, theirs)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels)[0], (logits,))


@pytest.mark.parametrize("dtype", HALVES)
def test_cross_entropy_of_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    logits = randn(64, 50, dtype=dtype).requires_grad_()
    labels = torch.arange(64) % 50
    total, _ = cross_entropy(logits, labels)
    assert total.dtype == torch.float32
    wide = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(wide, labels, reduction="sum")
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0.0)
    (ours,), (theirs,) = torch.autograd.grad(total, logits), torch.autograd.grad(expected, wide)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_cross_entropy_without_counted_rows_is_zero_even_of_nan() -> None:
    logits = torch.full((3, 4), math.nan, dtype=torch.float64, requires_grad=True)
    total, count = cross_entropy(logits, torch.full((3,), -100))
    assert (total.item(), int(count)) == (0.0, 0)
    (gradient,) = torch.autograd.grad(total, logits)
    assert torch.equal(gradient, torch.zeros(3, 4, dtype=torch.float64))


def test_cross_entropy_of_no_rows_is_zero() -> None:
    total, count = cross_entropy(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    assert (total.item(), int(count), total.requires_grad) == (0.0, 0, True)


@pytest.mark.parametrize("chunk", [1, 3, 8, 1024])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_cross_entropy_is_both_ops_one_after_the_other(chunk: int, with_bias: bool) -> None:
    hidden, weight = randn(2, 4, 6).requires_grad_(), randn(9, 6, seed=1).requires_grad_()
    bias = randn(9, seed=2).requires_grad_() if with_bias else None
    labels = torch.tensor([[0, 8, -100, 3], [-100, 2, 2, 5]])
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    total = linear_cross_entropy(hidden, weight, labels, bias, chunk=chunk)
    expected, _ = cross_entropy(F.linear(hidden, weight, bias), labels)
    same(total, expected)
    ours, theirs = torch.autograd.grad(total / 7, inputs), torch.autograd.grad(expected / 7, inputs)
    for a, b in zip(ours, theirs, strict=True):
        same(a, b)
    with torch.no_grad():
        same(linear_cross_entropy(hidden, weight, labels, bias, chunk=chunk), expected)


def test_linear_cross_entropy_gives_only_the_gradients_that_are_asked_for() -> None:
    hidden, weight = randn(4, 6), randn(9, 6, seed=1).requires_grad_()
    total = linear_cross_entropy(hidden, weight, torch.arange(4), chunk=3)
    total.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert hidden.grad is None


def test_linear_cross_entropy_in_bfloat16_is_as_near_as_the_two_ops() -> None:
    hidden, weight = randn(64, 32, dtype=torch.bfloat16), randn(50, 32, seed=1, dtype=torch.bfloat16)
    labels = torch.arange(64) % 50
    truth = float(linear_cross_entropy(hidden.double(), weight.double(), labels))
    total = linear_cross_entropy(hidden, weight, labels, chunk=10)
    assert total.dtype == torch.float32
    plain = float(cross_entropy(hidden @ weight.T, labels)[0])
    assert abs(float(total) - truth) <= 2 * abs(plain - truth) + 1e-6 * truth
