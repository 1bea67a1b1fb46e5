"""Optimizer steps and the symmetric product as they are used: mixed dtypes, copies, narrow states, huge tensors, large matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colossal_core.ops import adamw as reference
from colossal_core.ops import symmetric_product as product_reference
from colossal_core.ops.adamw import AdamWSettings
from colossal_core.rounding import BLOCK, FIRST_MOMENT, SECOND_MOMENT, Code, Coded
from colossal_kernels.optimizers.adamw import adamw_step
from colossal_kernels.optimizers.symmetric_product import SMALLEST, symmetric_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Tensors = list[torch.Tensor]
SETTINGS = AdamWSettings(lr=1e-2, beta2=0.95, weight_decay=0.1)
SIZES = (1, 3, 255, 256, 1023, 1024, 1025, 70_001, 1 << 20)


def drawn(dtype: torch.dtype = torch.float32, grad: torch.dtype = torch.bfloat16) -> list[Tensors]:
    """Parameters, gradients and moments."""
    generator = torch.Generator("cuda").manual_seed(0)
    lists = [[torch.randn(size, generator=generator, device="cuda") for size in SIZES] for _ in range(4)]
    params, grads, first, second = lists
    states = [[tensor.to(dtype) for tensor in found] for found in (params, first)]
    return [states[0], [g.to(grad) for g in grads], states[1], [s.square().to(dtype) for s in second]]


def keywords(clip: float = 0.3, step: float = 3.0) -> dict[str, Any]:
    scalars = {"step": torch.tensor(step, device="cuda"), "clip": torch.tensor(clip, device="cuda")}
    return {"settings": SETTINGS, **scalars, "skip": torch.tensor(False, device="cuda")}


@pytest.mark.parametrize("grad", [torch.bfloat16, torch.float16, torch.float32])
def test_one_mixed_pass(grad: torch.dtype) -> None:
    ours, near = drawn(grad=grad), drawn(grad=grad)
    copies = [torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in SIZES]
    adamw_step(ours[0], ours[1], ours[2], ours[3], **keywords(), copies=copies)
    exact = [[tensor.double() for tensor in found] for found in near]
    for lists in (near, exact):
        reference.adamw_step(lists[0], lists[1], lists[2], lists[3], **keywords())
    for index in (0, 2, 3):
        for found, wide, wanted in zip(ours[index], near[index], exact[index], strict=True):
            allowed = 2.0 * (wide - wanted).abs().max() + 2.0**-23 * wanted.abs().max()
            assert (found - wanted).abs().max() <= allowed
    assert all(torch.equal(copy, param.bfloat16()) for copy, param in zip(copies, ours[0], strict=True))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_steps_repeat_bit_for_bit_and_never_wait() -> None:
    """100 times, with everything that is narrow rounded by one seed; the host waits for nothing once tables are there."""

    def run() -> list[Tensors]:
        lists = drawn(torch.bfloat16)
        adamw_step(lists[0], lists[1], lists[2], lists[3], **keywords(), seed=5)
        return lists

    first = run()
    for _ in range(100):
        again = run()
        for found, wanted in zip(again, first, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    lists, given = drawn(torch.bfloat16), keywords()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        adamw_step(lists[0], lists[1], lists[2], lists[3], **given, seed=5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def coded(code: Code, values: Tensors) -> list[Coded]:
    found = []
    for tensor in values:
        padded = torch.zeros(-(-tensor.numel() // BLOCK) * BLOCK, device="cuda")
        padded[: tensor.numel()] = tensor
        codes, scales = code.encode(padded, torch.Generator("cuda").manual_seed(0))
        found.append(Coded(codes, scales, code, tensor.numel()))
    return found


def decoded(kept: list[Coded]) -> torch.Tensor:
    return torch.cat([item.code.decode(item.codes, item.scales)[: item.numel] for item in kept])


def test_narrow_states_are_the_wide_ones_on_average() -> None:
    """Codes of both moments, and bf16 parameters, over seeds."""
    params, grads, firsts, seconds = drawn()
    first, second = coded(FIRST_MOMENT, firsts), coded(SECOND_MOMENT, seconds)
    moments = [decoded(first), decoded(second)]
    sizes = list(SIZES)
    wide_moments = [list(moment.split(sizes)) for moment in moments]  # type: ignore[no-untyped-call]
    wide = [p.bfloat16().float() for p in params]
    reference.adamw_step(wide, grads, wide_moments[0], wide_moments[1], **keywords())
    sums = [torch.zeros(sum(SIZES), device="cuda", dtype=torch.float64) for _ in range(3)]
    num_runs = 64
    for seed in range(num_runs):
        narrow = [p.bfloat16() for p in params]
        kept = coded(FIRST_MOMENT, firsts), coded(SECOND_MOMENT, seconds)
        adamw_step(narrow, grads, kept[0], kept[1], **keywords(), seed=seed)
        for total, found in zip(sums, (torch.cat(narrow), decoded(kept[0]), decoded(kept[1])), strict=True):
            total += found.double()
    exact = [torch.cat(wide), torch.cat(wide_moments[0]), torch.cat(wide_moments[1])]
    for total, wanted in zip(sums, exact, strict=True):
        errors = total / num_runs - wanted.double()
        assert errors.mean().abs() <= 5.0 * errors.std() / errors.numel() ** 0.5


def test_a_tensor_of_more_than_2_to_the_31_elements() -> None:
    """The last elements are, bit by bit, what they are alone."""
    numel, tail = (1 << 31) + 4096 + 5, 2048 + 5
    lists = [[torch.zeros(numel, dtype=torch.bfloat16, device="cuda")] for _ in range(4)]
    ends = []
    for found in lists:
        found[0][-tail:].normal_().abs_()
        ends.append([found[0][-tail:].clone()])
    adamw_step(lists[0], lists[1], lists[2], lists[3], **keywords())
    adamw_step(ends[0], ends[1], ends[2], ends[3], **keywords())
    for found, wanted in zip(lists, ends, strict=True):
        assert torch.equal(found[0][-tail:], wanted[0])
        assert not found[0][: 1 << 20].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "depth"), [(SMALLEST, 4096), (SMALLEST + 65, 1000), (4096, 512 + 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_symmetric_products_of_large_matrices(dtype: torch.dtype, size: int, depth: int, transposed: bool) -> None:
    """As near to the exact product as a library's, symmetric to the bit; then a step's polynomial of it."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, size, depth, generator=generator, device="cuda").to(dtype) / depth**0.5
    x = x.mT.contiguous().mT if transposed else x
    gram = symmetric_product(x)
    assert torch.equal(gram, gram.mT)
    assert near(gram, x @ x.mT, x.double() @ x.double().mT)
    scaled = gram / 4
    exact = 2.0 * scaled.double() @ scaled.double() - 4.5 * scaled.double()
    library = torch.baddbmm(scaled, scaled, scaled, beta=-4.5, alpha=2.0)
    assert near(symmetric_product(scaled, scaled, scaled, alpha=2.0, beta=-4.5), library, exact)


def near(ours: torch.Tensor, library: torch.Tensor, exact: torch.Tensor) -> bool:
    limit = 2.0 * (library - exact).norm() + torch.finfo(ours.dtype).eps * exact.norm()
    return bool((ours - exact).norm() <= limit)


def test_the_reference_is_met_by_strides_that_no_kernel_takes() -> None:
    x = torch.randn(1, SMALLEST, 128, device="cuda").bfloat16()[:, :, ::2]
    assert torch.equal(symmetric_product(x), product_reference.symmetric_product(x))
