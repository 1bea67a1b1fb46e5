"""Norms of rows as wide as large models have them, whose kernels the suite's small shapes do not reach, and packed gates in two layouts."""

from __future__ import annotations

import pytest
import torch

from colossal_core.ops.reference import reference_ops
from colossal_kernels.bench.case import Call, Draw
from colossal_kernels.bench.outcome import copied, distance, outcome, widened
from colossal_kernels.table import implementations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS = 300
"""More than programs that share them, in the narrower of the kernels."""


def vectors_of(op: str, draw: Draw, columns: int) -> list[torch.Tensor]:
    return [draw.normal(columns) for _ in range(1 if "rms" in op else 2)]


@pytest.mark.parametrize("columns", [4096, 8192, 12288, 16384, 20480])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"])
def test_norms(op: str, columns: int) -> None:
    function = next(found.function for found in implementations() if found.op == op)
    reference = next(found.function for found in reference_ops() if found.op == op)
    draw = Draw(torch.device("cuda"))
    rows = [draw.normal(ROWS, columns) for _ in range(2 if "add" in op else 1)]
    call = Call((*rows, *vectors_of(op, draw, columns), 1e-6))
    truth = outcome(reference, widened(call, torch.float64), ("both",))
    found, theirs = (outcome(one, copied(call), ("both",)) for one in (function, reference))
    assert distance(found, truth) <= 2 * distance(theirs, truth) + torch.finfo(torch.bfloat16).eps
    again = outcome(function, copied(call), ("both",))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("columns", [4096, 16384, 32768])
def test_eight_bits_are_the_rounded_quotient(columns: int) -> None:
    """But where the true quotient is a tie of two codes, to 2^-20 of it: there a product may choose the other one."""
    function, reference = (
        next(found.function for found in table if found.op == "rms_norm_fp8")
        for table in (implementations(), reference_ops())
    )
    draw = Draw(torch.device("cuda"))
    x, weight = (draw.normal(*shape, grad=False) for shape in ((ROWS, columns), (columns,)))
    (codes, scale), (same_codes, same_scale) = (one(x, weight, 1e-6) for one in (function, reference))
    torch.testing.assert_close(scale, same_scale, rtol=1e-6, atol=0.0)
    wide, wide_scale = x.double(), same_scale.double()
    y = wide * (wide.square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    other = codes.float() != same_codes.float()
    found, wanted, quotient = (tensor.double()[other] for tensor in (codes.float(), same_codes.float(), y / wide_scale))
    tie = (found + wanted) / 2
    assert bool(((quotient - tie).abs() <= 2.0**-20 * tie.abs()).all())
    assert bool(((found - wanted).abs() <= 2.0**-2 * tie.abs() + 2.0**-9).all())  # neighbours
    assert other.double().mean() < 1e-3


@pytest.mark.parametrize("overwrite", [False, True])
def test_gates_in_turn_are_the_same_as_one_list_and_as_rows(overwrite: bool) -> None:
    function = next(found.function for found in implementations() if found.op == "packed_swiglu")
    draw = Draw(torch.device("cuda"))
    x, end = draw.normal(ROWS, 2 * 2880, grad=False), draw.normal(ROWS, 2880, grad=False)
    results = []
    for gap in (0, 16):
        leaf = torch.cat([x, x[:, :gap]], dim=1).requires_grad_()
        view = (1 * leaf)[:, : x.shape[1]]
        y = function(view, interleaved=True, alpha=1.702, limit=7.0, shift=1.0, overwrite=overwrite)
        (grad,) = torch.autograd.grad(y, view, end)
        results.append((y, grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
