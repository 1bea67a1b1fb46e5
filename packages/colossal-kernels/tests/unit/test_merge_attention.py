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
    monkeypatch.setattr(module, "VECTOR", 1)
    monkeypatch.setattr(module, "WARPS", 1)
    outputs, lses = parts(3, 2, 2, 3, 5)
    check(outputs, lses)


def check(outputs: list[Tensor], lses: list[Tensor]) -> None:
    """Values and gradients are the reference's."""

    def run(op: Any) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (*outputs, *lses)]
        out, lse = op(leaves[: len(outputs)], leaves[len(outputs) :])
        end = (out.float() * torch.arange(out.numel()).view(out.shape).cos()).sum() + lse.square().sum()
        return [out, lse, *torch.autograd.grad(end, leaves)]

    for ours, theirs in zip(run(merge_attention), run(reference.merge_attention), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [8, 9, 16])
def test_more_parts_than_a_kernel_reads_at_once(count: int) -> None:
    outputs, lses = parts(count, 1, 2, 3, 4)
    for number, lse in enumerate(lses):
        lse[0, 0, 0], lse[0, 1, number % 3] = -math.inf, -math.inf
    outputs[-1][0, 0, 0] = math.nan
    check(outputs, lses)


def test_parts_of_several_layouts() -> None:
    outputs, lses = parts(3, 2, 3, 4, 5)
    outputs[1] = outputs[1].transpose(1, 2).contiguous().transpose(1, 2)
    check(outputs, lses)
    check([outputs[1], outputs[0], outputs[2]], lses)
    check([outputs[1]] * 3, lses)
    joined, of_joined = merge_attention([outputs[1].clone(), outputs[0]], [lses[0].clone(), lses[1]], overwrite=True)
    expected = reference.merge_attention(outputs[1::-1], lses[:2])
    torch.testing.assert_close((joined, of_joined), expected, rtol=1e-6, atol=1e-6)


def test_a_wide_first_part() -> None:
    outputs, lses = parts(3, 1, 2, 3, 4)
    out, _ = merge_attention([outputs[0], *(part.half() for part in outputs[1:])], lses)
    expected, _ = reference.merge_attention([outputs[0], *(part.half().float() for part in outputs[1:])], lses)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


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
    outputs, lses = parts(2, 1, 2, 3, 4, dtype=torch.float16)
    stride = 2**31 + 24
    memory = torch.empty(stride + 24, dtype=torch.float16)
    places = [memory.as_strided((1, 2, 3, 4), (4, stride, 4, 1), start) for start in (0, 12)]
    apart = [place.copy_(part) for place, part in zip(places, outputs, strict=True)]
    expected, lse = merge_attention(outputs, lses)
    assert torch.equal(merge_attention(apart, lses)[0], expected)
    backward: Any = torch.ops.colossal_kernels.merge_attention_backward
    given = expected, lse, lse
    for ours, theirs in zip(backward(*given, apart, lses)[0], backward(*given, outputs, lses)[0], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(backward(*given, apart, lses)[1], backward(*given, outputs, lses)[1])
    merge_attention(apart, [lses[0].clone(), lses[1]], overwrite=True)
    assert torch.equal(apart[0], expected)


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
    given = (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3), lses[0], outputs, lses)
    torch.library.opcheck(kernels.merge_attention_backward.default, given, test_utils=utilities)
