"""The reference ops against independent computations in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from colossal_core.ops import OP_NAMES, build_op_table
from colossal_core.ops import cross_entropy as cross_entropy_module
from colossal_core.ops.compiled_cross_entropy import compiled_cross_entropy
from colossal_core.ops.reference import (
    LossTerms,
    Words,
    add_layer_norm,
    add_rms_norm,
    attention,
    cross_entropy,
    geglu,
    layer_norm,
    linear_cross_entropy,
    merge_attention,
    packed_geglu,
    packed_swiglu,
    reference_ops,
    rms_norm,
    rms_norm_fp8,
    rotary,
    swiglu,
    vocabulary_gradient,
    vocabulary_statistics,
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


def test_norms_with_an_offset_multiply_by_its_sum_with_the_weight() -> None:
    x, weight, bias = randn(2, 3, 8), randn(8, seed=1), randn(8, seed=2)
    same(rms_norm(x, weight, 1e-6, offset=1.0), rms_norm(x, 1.0 + weight, 1e-6))
    same(layer_norm(x, weight, bias, 1e-6, offset=1.0), layer_norm(x, 1.0 + weight, bias, 1e-6))
    same(rms_norm(x, None, 1e-6, offset=1.0), rms_norm(x, None, 1e-6))
    same(layer_norm(x, None, bias, 1e-6, offset=1.0), layer_norm(x, None, bias, 1e-6))


def test_an_offset_is_added_before_the_only_rounding() -> None:
    x, weight = randn(4, 64, dtype=torch.bfloat16), (0.001 * randn(64, seed=1)).to(torch.bfloat16)
    y = rms_norm(x, weight, 1e-6, offset=1.0)
    truth = rms_norm(x.double(), weight.double(), 1e-6, offset=1.0)
    torch.testing.assert_close(y.double(), truth, rtol=2**-8, atol=0.0)


def test_norms_after_an_addition_are_those_of_the_rounded_sum() -> None:
    x, residual = randn(3, 8, dtype=torch.bfloat16), randn(3, 8, seed=1, dtype=torch.bfloat16)
    weight, bias = randn(8, seed=2, dtype=torch.bfloat16), randn(8, seed=3, dtype=torch.bfloat16)
    for (y, total), norm in (
        (add_rms_norm(x, residual, weight, 1e-6), rms_norm(x + residual, weight, 1e-6)),
        (add_layer_norm(x, residual, weight, bias, 1e-6), layer_norm(x + residual, weight, bias, 1e-6)),
    ):
        assert torch.equal(total, x + residual)
        assert torch.equal(y, norm)


def test_a_norm_in_eight_bits_is_within_their_rounding() -> None:
    x, weight = randn(5, 64).masked_fill(torch.arange(5).unsqueeze(1) == 2, 0.0), randn(64, seed=1)
    y, scale = rms_norm_fp8(x, weight, 1e-6)
    assert (y.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (5, 1))
    assert y.float().abs().amax(-1).tolist() == [448.0, 448.0, 0.0, 448.0, 448.0]
    assert float(scale[2]) == 1.0
    wanted = rms_norm(x, weight, 1e-6)
    assert bool(((y.double() * scale - wanted).abs() <= wanted.abs() * 2**-4 + scale * 2**-10).all())
    assert not rms_norm_fp8(x.requires_grad_(), weight, 1e-6)[0].requires_grad


@pytest.mark.parametrize("turning", [8, 4])
def test_rotary_is_multiplication_of_complex_numbers(turning: int) -> None:
    q, k = randn(2, 4, 5, 8), randn(2, 2, 5, 8, seed=1)
    angles = randn(1, 5, turning // 2, seed=2)
    doubled = torch.cat((angles, angles), dim=-1)
    for x, turned in zip((q, k), rotary(q, k, doubled.cos(), doubled.sin()), strict=True):
        pairs = torch.complex(x[..., : turning // 2], x[..., turning // 2 : turning])
        expected = pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
        same(turned, torch.cat((expected.real, expected.imag, x[..., turning:]), dim=-1))


@pytest.mark.parametrize("turning", [8, 4])
@pytest.mark.parametrize("placed", ["halves", "neighbours", "once"])
@pytest.mark.parametrize("to_halves", [False, True])
def test_interleaved_rotary_is_multiplication_of_complex_numbers(turning: int, placed: Any, to_halves: bool) -> None:
    q, k = randn(2, 4, 5, 8), randn(2, 2, 5, 8, seed=1)
    angles = randn(2, 5, turning // 2, seed=2)
    given = {
        "halves": torch.cat((angles, angles), dim=-1),
        "neighbours": angles.repeat_interleave(2, -1),
        "once": angles,
    }
    cos, sin = given[placed].cos(), given[placed].sin()
    found = rotary(q, k, cos, sin, interleaved=True, angles=placed, to_halves=to_halves)
    for x, turned in zip((q, k), found, strict=True):
        pairs = torch.view_as_complex(x[..., :turning].reshape(*x.shape[:-1], turning // 2, 2))
        expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(1))
        parts = expected.transpose(-1, -2) if to_halves else expected
        same(turned, torch.cat((parts.reshape(*x.shape[:-1], turning), x[..., turning:]), dim=-1))


def test_rotary_keeps_the_dtype_under_wider_angles() -> None:
    q = randn(1, 1, 3, 4, dtype=torch.bfloat16)
    angles = randn(1, 3, 4, dtype=torch.float32)
    assert [turned.dtype for turned in rotary(q, q, angles.cos(), angles.sin())] == [torch.bfloat16] * 2


def test_swiglu_is_its_formula() -> None:
    gate, up = randn(3, 8), randn(3, 8, seed=1)
    same(swiglu(gate, up), gate / (1 + (-gate).exp()) * up)


def test_geglu_is_its_formula() -> None:
    gate, up = randn(3, 8), randn(3, 8, seed=1)
    same(geglu(gate, up), gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    same(geglu(gate, up, approximate="tanh"), 0.5 * gate * (1 + torch.tanh(inner)) * up)


def test_packed_gates_are_those_of_their_parts() -> None:
    gate, up, weights = randn(3, 8), randn(3, 8, seed=1), randn(3, seed=2)
    halves, turns = torch.cat((gate, up), -1), torch.stack((gate, up), -1).flatten(-2)
    for packed, interleaved in ((halves, False), (turns, True)):
        same(packed_swiglu(packed, interleaved=interleaved), swiglu(gate, up))
        same(packed_geglu(packed, interleaved=interleaved), geglu(gate, up))
        weighted = packed_swiglu(packed, interleaved=interleaved, weights=weights)
        same(weighted, swiglu(gate, up, weights=weights))
        same(weighted, swiglu(gate, up) * weights.unsqueeze(-1))
    clamped, within = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
    expected = (within + 1) * clamped * torch.sigmoid(1.702 * clamped)
    same(packed_swiglu(halves, alpha=1.702, limit=0.7, shift=1.0), expected)


def test_weights_in_float32_keep_the_dtype_of_a_gate() -> None:
    gate = randn(3, 8, dtype=torch.bfloat16)
    assert swiglu(gate, gate, weights=torch.ones(3)).dtype == torch.bfloat16


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


@pytest.mark.usefixtures("chunk_logits")
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_terms_of_the_loss_are_their_formulas(smoothing: float, z_loss: float) -> None:
    hidden, weight = randn(8, 4), randn(7, 4, seed=1)
    logits, labels = (hidden @ weight.T).requires_grad_(), torch.tensor([0, 6, -100, 3, -100, 2, 2, 5])
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    expected = expected + z_loss * torch.logsumexp(logits, 1)[labels != -100].square().sum()
    (theirs,) = torch.autograd.grad(expected, logits)
    for op in (cross_entropy, compiled_cross_entropy("eager", dynamic=False)):
        total, count = op(logits, labels, z_loss=z_loss, smoothing=smoothing)
        (ours,) = torch.autograd.grad(total, logits)
        same(total, expected)
        same(ours, theirs)
        assert int(count) == 6
    chunks = linear_cross_entropy(hidden, weight, labels, budget_bytes=100, z_loss=z_loss, smoothing=smoothing)
    same(chunks, expected)


@pytest.mark.usefixtures("chunk_logits")
def test_parts_of_the_vocabulary_make_the_whole_loss_and_gradient() -> None:
    """Joined as the ranks join them, with what pads each part far above every logit."""
    logits, labels = randn(5, 13).requires_grad_(), torch.tensor([0, 12, -100, 7, 5])
    terms, cuts = LossTerms(-100, 0.1, 0.2), [Words(0, 6, 13), Words(6, 6, 13), Words(6, 13, 13)]
    expected, _ = cross_entropy(logits, labels, z_loss=0.1, smoothing=0.2)
    (theirs,) = torch.autograd.grad(0.7 * expected, logits)
    parts = [F.pad(logits.detach()[:, cut.start : cut.stop], (0, 2), value=1e9) for cut in cuts]
    found = torch.stack(
        [vocabulary_statistics(part, labels, cut, terms) for part, cut in zip(parts, cuts, strict=True)]
    )
    assert torch.equal(found[:, :, 2], torch.zeros(3, 4, dtype=torch.float64))
    largest = found[:, 0].amax(0)
    lse = ((found[:, 0] - largest).exp() * found[:, 1]).sum(0).log() + largest
    losses = lse - 0.8 * found[:, 2].sum(0) - 0.2 * found[:, 3].sum(0) / 13 + 0.1 * lse.square()
    same(losses[labels != -100].sum(), expected)
    scale = torch.tensor(0.7, dtype=torch.float64)
    for part, cut in zip(parts, cuts, strict=True):
        gradient = vocabulary_gradient(scale, part, labels, lse, cut, terms)
        same(gradient[:, : cut.size], theirs[:, cut.start : cut.stop])
        assert not gradient[:, cut.size :].any()
        over = vocabulary_gradient(scale, part, labels, lse, cut, terms, overwrite=True)
        assert over.data_ptr() == part.data_ptr() and torch.equal(over, gradient)


def test_merged_attention_is_attention_over_all_keys() -> None:
    q, k, v = (randn(1, 2, 6, 4, seed=seed).requires_grad_() for seed in range(3))
    outputs, lses = [], []
    for keys in (slice(0, 2), slice(2, 5), slice(5, 6)):
        scores = q @ k[:, :, keys].transpose(-1, -2) / 2.0
        outputs.append(torch.softmax(scores, -1) @ v[:, :, keys])
        lses.append(torch.logsumexp(scores, -1))
    out, lse = merge_attention(outputs, lses)
    expected, of_all = attention(q, k, v), torch.logsumexp(q @ k.transpose(-1, -2) / 2.0, -1)
    same(out, expected)
    same(lse, of_all)
    weight = randn(1, 2, 6, seed=4)
    ours = torch.autograd.grad((out * randn(1, 2, 6, 4, seed=3)).sum() + (lse * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad(
        (expected * randn(1, 2, 6, 4, seed=3)).sum() + (of_all * weight).sum(), (q, k, v), allow_unused=True
    )
    for a, b in zip(ours, theirs, strict=True):
        assert b is not None
        same(a, b)


def test_what_no_part_sees_is_zero_with_zero_gradients() -> None:
    outputs = [randn(1, 1, 2, 3, seed=seed) for seed in range(2)]
    lses = [randn(1, 1, 2, seed=seed) for seed in range(2, 4)]
    outputs[0][0, 0, 0], outputs[1][0, 0, 0] = math.nan, math.inf
    lses[0][0, 0, 0] = lses[1][0, 0, 0] = -math.inf
    inputs = [tensor.requires_grad_() for tensor in (*outputs, *lses)]
    out, lse = merge_attention(outputs, lses)
    assert not out[0, 0, 0].any() and lse[0, 0, 0] == -math.inf
    gradients = torch.autograd.grad(out.sum() + lse[..., 1].sum(), inputs)
    assert all(bool(gradient.isfinite().all()) and not gradient[0, 0, 0].any() for gradient in gradients)


def test_merged_attention_takes_the_place_of_the_first_part() -> None:
    outputs, lses = (
        [randn(1, 2, 3, 4, seed=seed) for seed in range(2)],
        [randn(1, 2, 3, seed=seed) for seed in range(2)],
    )
    expected, of_both = merge_attention(outputs, lses)
    out, lse = merge_attention(outputs, lses, overwrite=True)
    assert (out.data_ptr(), lse.data_ptr()) == (outputs[0].data_ptr(), lses[0].data_ptr())
    assert torch.equal(out, expected) and torch.equal(lse, of_both)


def test_cross_entropy_without_counted_rows_is_zero_even_of_nan() -> None:
    logits = torch.full((3, 4), math.nan, dtype=torch.float64, requires_grad=True)
    total, count = cross_entropy(logits, torch.full((3,), -100))
    assert (total.item(), int(count)) == (0.0, 0)
    (gradient,) = torch.autograd.grad(total, logits)
    assert torch.equal(gradient, torch.zeros(3, 4, dtype=torch.float64))


def test_cross_entropy_of_no_rows_is_zero() -> None:
    total, count = cross_entropy(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    assert (total.item(), int(count), total.requires_grad) == (0.0, 0, True)


@pytest.mark.parametrize("rows", [0, 1, 3, 8, 1024])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_cross_entropy_is_both_ops_one_after_the_other(rows: int, with_bias: bool) -> None:
    budget_bytes = rows * 9 * 8
    hidden, weight = randn(2, 4, 6).requires_grad_(), randn(9, 6, seed=1).requires_grad_()
    bias = randn(9, seed=2).requires_grad_() if with_bias else None
    labels = torch.tensor([[0, 8, -100, 3], [-100, 2, 2, 5]])
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    total = linear_cross_entropy(hidden, weight, labels, bias, budget_bytes=budget_bytes)
    expected, _ = cross_entropy(F.linear(hidden, weight, bias), labels)
    same(total, expected)
    ours, theirs = torch.autograd.grad(total / 7, inputs), torch.autograd.grad(expected / 7, inputs)
    for a, b in zip(ours, theirs, strict=True):
        same(a, b)
    with torch.no_grad():
        same(linear_cross_entropy(hidden, weight, labels, bias, budget_bytes=budget_bytes), expected)


def test_linear_cross_entropy_gives_only_the_gradients_that_are_asked_for() -> None:
    hidden, weight = randn(4, 6), randn(9, 6, seed=1).requires_grad_()
    total = linear_cross_entropy(hidden, weight, torch.arange(4), budget_bytes=3 * 9 * 8)
    total.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert hidden.grad is None


def test_linear_cross_entropy_in_bfloat16_is_as_near_as_the_two_ops() -> None:
    hidden, weight = randn(64, 32, dtype=torch.bfloat16), randn(50, 32, seed=1, dtype=torch.bfloat16)
    labels = torch.arange(64) % 50
    truth = float(linear_cross_entropy(hidden.double(), weight.double(), labels))
    total = linear_cross_entropy(hidden, weight, labels, budget_bytes=10 * 50 * 2)
    assert total.dtype == torch.float32
    plain = float(cross_entropy(hidden @ weight.T, labels)[0])
    assert abs(float(total) - truth) <= 2 * abs(plain - truth) + 1e-6 * truth
