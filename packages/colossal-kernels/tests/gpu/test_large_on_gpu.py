"""Tensors of more than 2^31 elements: the last rows of a large call are, bit by bit, what a call of these rows alone gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from colossal_core.ops.low_precision import Granularity
from colossal_kernels.table import implementations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FOUND = {found.op: found.function for found in implementations() if found.provider == "triton"}
WIDTH = 4096
ROWS = (1 << 31) // WIDTH + 24
"""So that offsets of the last rows do not fit in 32 bits with a sign."""
TAIL = 8


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Made in pieces: random numbers of this many elements at once would need twice the memory."""
    made = torch.empty(shape, dtype=dtype, device="cuda")
    for part in torch.split(made, max(1, len(made) // 8)):
        part.normal_()
    return made


def kernel(op: str) -> Callable[..., Any]:
    if op not in FOUND:
        pytest.skip(f"no kernel of {op}")
    return FOUND[op]


def gradients(function: Callable[..., Any], inputs: list[Tensor], weight: Tensor | None) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    end = function(*leaves)
    return torch.autograd.grad(end, leaves, weight)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_norms(op: str) -> None:
    function, x, weight = kernel(op), drawn(ROWS, WIDTH), drawn(WIDTH)
    more: tuple[Any, ...] = (weight, 1e-6) if op == "rms_norm" else (weight, drawn(WIDTH), 1e-6)
    assert torch.equal(function(x, *more)[-TAIL:], function(x[-TAIL:], *more))
    grad = drawn(ROWS, WIDTH)
    (found,) = gradients(lambda x: function(x, *more), [x], grad)
    (alone,) = gradients(lambda x: function(x, *more), [x[-TAIL:]], grad[-TAIL:])
    assert torch.equal(found[-TAIL:], alone)


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
def test_gates(op: str) -> None:
    function, gate, up, grad = kernel(op), drawn(ROWS, WIDTH), drawn(ROWS, WIDTH), drawn(ROWS, WIDTH)
    assert torch.equal(function(gate, up)[-TAIL:], function(gate[-TAIL:], up[-TAIL:]))
    found = gradients(function, [gate, up], grad)
    alone = gradients(function, [gate[-TAIL:], up[-TAIL:]], grad[-TAIL:])
    assert all(torch.equal(one[-TAIL:], other) for one, other in zip(found, alone, strict=True))


def test_cross_entropy() -> None:
    function, vocabulary = kernel("cross_entropy"), 128256
    rows = (1 << 31) // vocabulary + 24
    logits = drawn(rows, vocabulary)
    labels = torch.randint(vocabulary, (rows,), device="cuda")
    (found,) = gradients(lambda logits: function(logits, labels)[0], [logits], None)
    tail = 512  # enough that a program reads a row whole, as of many rows: sums are taken in the same order
    (alone,) = gradients(lambda logits: function(logits, labels[-tail:])[0], [logits[-tail:]], None)
    assert torch.equal(found[-tail:], alone)


def test_rotary() -> None:
    function, length = kernel("rotary"), ROWS * WIDTH // (32 * 128) // 8 * 8
    q, k = (drawn(1, length, heads, 128).transpose(1, 2) for heads in (32, 1))
    cos, sin = drawn(1, length, 128), drawn(1, length, 128)
    found = function(q, k, cos, sin)
    alone = function(q[:, :, -TAIL:], k[:, :, -TAIL:], cos[:, -TAIL:], sin[:, -TAIL:])
    assert all(torch.equal(one[:, :, -TAIL:], other) for one, other in zip(found, alone, strict=True))


def test_experts_rows() -> None:
    permute, order_of = kernel("expert_permute"), kernel("expert_order")
    top_k = 8
    x = drawn(ROWS // top_k + 1, WIDTH)
    chosen = torch.rand(len(x), 64, device="cuda").topk(top_k, dim=1).indices
    order, inverse, _ = order_of(chosen, 64)
    y = permute(x, order, inverse)
    assert y.numel() > 1 << 31
    assert torch.equal(y[-TAIL:], x[order[-TAIL:].long() // top_k])
    back = kernel("expert_unpermute")(y, order, inverse)
    few = inverse[-TAIL:].long()
    expected = y[few].float().sum(1).bfloat16()
    assert torch.allclose(back[-TAIL:].float(), expected.float(), rtol=2**-7)


def test_quantized() -> None:
    function, x = kernel("quantize_fp8"), drawn(ROWS, WIDTH)
    codes, scales = function(x, Granularity.ROW)
    few, of_few = function(x[-TAIL:], Granularity.ROW)
    assert torch.equal(codes[-TAIL:].view(torch.uint8), few.view(torch.uint8))
    assert torch.equal(scales[-TAIL:], of_few)
    codes, scales = kernel("quantize_blocks")(x)
    few, of_few = kernel("quantize_blocks")(x[-TAIL:])
    assert torch.equal(codes[-few.numel() :], few)
    assert torch.equal(scales[-of_few.numel() :], of_few)


def test_adamw() -> None:
    from colossal_core.ops.reference import AdamWSettings

    function, size = kernel("adamw_step"), (1 << 31) + 512
    keywords = {"settings": AdamWSettings(lr=1e-2), "step": torch.tensor(3.0, device="cuda")}
    param, first = drawn(size, dtype=torch.float32), drawn(size, dtype=torch.float32)
    grad, second = drawn(size), torch.ones(size, device="cuda")
    few = [tensor[-512:].clone() for tensor in (param, grad, first, second)]
    function([param], [grad], [first], [second], **keywords)
    function(*([tensor] for tensor in few), **keywords)
    for one, other in zip((param, first, second), (few[0], few[2], few[3]), strict=True):
        assert torch.equal(one[-512:], other)
