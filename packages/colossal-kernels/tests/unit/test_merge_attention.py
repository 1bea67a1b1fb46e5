"""Joining attention over parts of the keys, in the interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from colossal_core.ops import reference
from colossal_core.testing import OpSuite
from colossal_kernels.attention import merge as module
from colossal_kernels.attention.merge import merge_attention
from colossal_kernels.table import implementations


class TestMergeAttention(OpSuite):
    implementation = next(found for found in implementations() if found.op == "merge_attention")
    dtypes = ("float32", "float16")


def parts(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    outputs = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    return outputs, [torch.randn(shape[:-1], generator=generator) for _ in range(count)]


def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", 16)
    outputs, lses = parts(3, 2, 2, 3, 5)
    found, expected = merge_attention(outputs, lses), reference.merge_attention(outputs, lses)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def blind() -> tuple[list[Tensor], list[Tensor]]:
    """The first query sees nothing of the first part, the second nothing of either."""
    outputs, lses = parts(2, 1, 1, 3, 4)
    lses[0][..., :2] = -math.inf
    lses[1][..., 1] = -math.inf
    outputs[0][..., :2, :] = math.nan
    outputs[1][..., 1, :] = math.inf
    return outputs, lses


@pytest.mark.parametrize("op", [merge_attention, reference.merge_attention], ids=["triton", "reference"])
def test_what_a_query_does_not_see_adds_nothing(op: Any) -> None:
    outputs, lses = blind()
    inputs = [tensor.requires_grad_() for tensor in (*outputs, *lses)]
    out, lse = op(outputs, lses)
    assert torch.equal(out[0, 0, 0], outputs[1][0, 0, 0])
    assert lse[0, 0, 0] == lses[1][0, 0, 0]
    assert not out[0, 0, 1].any() and lse[0, 0, 1] == -math.inf
    gradients = torch.autograd.grad((out * 2.0)[..., 0, :].sum() + out[..., 1:, :].sum() + lse[..., 0].sum(), inputs)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert not any(gradient[0, 0, 1].any() for gradient in gradients)
    assert not gradients[0][0, 0, 0].any() and torch.equal(gradients[1][0, 0, 0], torch.full((4,), 2.0))
    assert (float(gradients[2][0, 0, 0]), float(gradients[3][0, 0, 0])) == (0.0, 1.0)


@pytest.mark.parametrize("op", [merge_attention, reference.merge_attention], ids=["triton", "reference"])
def test_a_ring_joins_each_part_to_what_there_is(op: Any) -> None:
    outputs, lses = parts(4, 2, 3, 5, 8, dtype=torch.float16)
    truth = reference.merge_attention([part.double() for part in outputs], [lse.double() for lse in lses])
    out, lse = outputs[0].float(), lses[0].clone()
    places = out.data_ptr(), lse.data_ptr()
    for part, of_part in zip(outputs[1:], lses[1:], strict=True):
        joined = op([out, part], [lse, of_part], overwrite=True)
        assert (joined[0].data_ptr(), joined[1].data_ptr()) == places
    torch.testing.assert_close(out.double(), truth[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), truth[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_part_that_is_not_seen_gives_zeros(overwrite: bool) -> None:
    outputs, lses = parts(1, 1, 1, 2, 4)
    lses[0][..., 0], outputs[0][..., 0, :] = -math.inf, math.nan
    out, lse = merge_attention(outputs, lses, overwrite=overwrite)
    assert not out[0, 0, 0].any() and lse[0, 0, 0] == -math.inf
    assert torch.equal(out[0, 0, 1], outputs[0][0, 0, 1])


@pytest.mark.parametrize("op", [merge_attention, reference.merge_attention], ids=["triton", "reference"])
def test_what_is_written_over_cannot_be_differentiated_as_if_it_were_not(op: Any) -> None:
    outputs, lses = parts(2, 1, 1, 2, 4)
    first = outputs[0].requires_grad_()
    square = first.square().square()
    end = square.square()
    op([square, outputs[1]], lses, overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(end.sum(), first)


def test_attention_over_parts_is_attention_over_all() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    outputs, lses = [], []
    for keys in (slice(0, 2), slice(2, 5), slice(5, 6)):
        scores = q @ k[:, :, keys].transpose(-1, -2) / 2.0
        outputs.append(torch.softmax(scores, -1) @ v[:, :, keys])
        lses.append(torch.logsumexp(scores, -1))
    whole = reference.attention(q, k, v)
    torch.testing.assert_close(reference.merge_attention(outputs, lses)[0], whole, rtol=1e-12, atol=1e-12)
    narrow = merge_attention([part.float() for part in outputs], [lse.float() for lse in lses])[0]
    torch.testing.assert_close(narrow.double(), whole, rtol=1e-5, atol=1e-5)


def test_heads_more_than_2_31_elements_apart() -> None:
    """4 GiB of addresses, of which only two pages are ever touched."""
    (first, second), lses = parts(2, 1, 2, 3, 4, dtype=torch.float16)
    stride = 2**31 + 8
    apart = torch.empty(stride + 12, dtype=torch.float16).as_strided((1, 2, 3, 4), (4, stride, 4, 1)).copy_(first)
    expected = merge_attention([first, second], lses)[0]
    assert torch.equal(merge_attention([apart, second], lses)[0], expected)
    merge_attention([apart, second], [lses[0].clone(), lses[1]], overwrite=True)
    assert torch.equal(apart, expected)


def test_every_run_gives_the_same_bits() -> None:
    outputs, lses = parts(3, 1, 2, 3, 4)
    first = merge_attention(outputs, lses)
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(merge_attention(outputs, lses), first, strict=True))


def test_torch_knows_the_operators() -> None:
    kernels: Any = torch.ops.colossal_kernels
    outputs, lses = parts(3, 1, 2, 3, 4)
    utilities = ("test_schema", "test_faketensor")
    leaves = [part.clone().requires_grad_() for part in outputs], [lse.clone().requires_grad_() for lse in lses]
    tried = (*utilities, "test_autograd_registration")
    torch.library.opcheck(kernels.merge_attention.default, leaves, test_utils=tried)
    pair = (outputs[0], lses[0], outputs[1], lses[1])
    torch.library.opcheck(kernels.merge_attention_.default, pair, test_utils=utilities)
    given = (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3), *pair)
    torch.library.opcheck(kernels.merge_attention_backward.default, given, test_utils=utilities)
