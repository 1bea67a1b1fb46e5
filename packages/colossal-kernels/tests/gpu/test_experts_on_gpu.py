"""Experts, fp8 and joined attention where the interpreter cannot go: tensor cores, many warps, and a device that must not be waited for."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from colossal_core.difference import relative_difference
from colossal_core.ops import experts as reference
from colossal_core.ops import low_precision
from colossal_core.ops.low_precision import Granularity, Recipe
from colossal_kernels.attention.merge import merge_attention
from colossal_kernels.experts.grouped_matmul import grouped_matmul
from colossal_kernels.experts.layer import experts
from colossal_kernels.low_precision.quantize_fp8 import quantize_fp8
from colossal_kernels.low_precision.scaled_matmul import scaled_matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
LEARNED = (0, 1, 2, 4)


def arguments(num_experts: int = 9) -> list[torch.Tensor]:
    """300 tokens, top 3, 256 features, 136 hidden; the last expert is chosen by nobody."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE)

    chosen = torch.rand(300, num_experts - 1, generator=generator, device=DEVICE).argsort(dim=1)[:, :3]
    matrices = normal(num_experts, 272, 256) / 16, normal(num_experts, 256, 136) / 12
    wide = [normal(300, 256), *matrices, chosen, normal(300, 3).softmax(dim=1)]
    half = [tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in wide[:4]]
    return [tensor.requires_grad_(index in LEARNED) for index, tensor in enumerate([*half, wide[4]])]


def gradients(y: torch.Tensor, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    weight = torch.arange(y.numel(), device=y.device).remainder(7).sub(3).to(y.dtype).view_as(y)
    return torch.autograd.grad(y, [given[index] for index in LEARNED], weight)


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_layer_is_as_near_to_the_truth_as_the_reference() -> None:
    given = arguments()
    wide = [tensor.detach().double().requires_grad_() if tensor.is_floating_point() else tensor for tensor in given]
    results = []
    for function, tensors in ((experts, given), (reference.experts, given), (reference.experts, wide)):
        y = function(*tensors)
        results.append((y, *gradients(y, tensors)))
    for ours, near, truth in zip(*results, strict=True):
        assert relative_difference(ours, truth) <= max(2.0 * relative_difference(near, truth), 2.0**-8)


def test_an_expert_that_nobody_chose_has_a_zero_gradient() -> None:
    given = arguments()
    _, grad_gate_up, grad_down, _ = gradients(experts(*given), given)
    assert not bool(grad_gate_up[-1].any())
    assert not bool(grad_down[-1].any())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.usefixtures("_no_waiting")
def test_the_layer_does_not_wait_for_the_device() -> None:
    given = arguments()
    gradients(experts(*given), given)
    torch.cuda.set_sync_debug_mode("error")
    found = gradients(experts(*given), given)
    torch.cuda.set_sync_debug_mode("default")
    assert all(bool(gradient.isfinite().all()) for gradient in found)


@pytest.mark.parametrize("gradient", ["neither", "left", "right"])
@pytest.mark.parametrize("recipe", list(Recipe))
def test_products_in_fp8_are_those_of_the_numbers_that_codes_stand_for(recipe: Recipe, gradient: str) -> None:
    """To the rounding of bf16 and of the tensor cores' sums, whose addends keep 14 bits. A gradient is in e5m2, which torch refuses in
    blocks: those products are the reference's.
    """
    left, right = recipe.granularities()
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, w = (torch.randn(shape, generator=generator, device=DEVICE).bfloat16() for shape in ((272, 640), (384, 640)))
    a, scale_a = quantize_fp8(x, left, dtype=torch.float8_e5m2 if gradient == "left" else torch.float8_e4m3fn)
    b, scale_b = quantize_fp8(w, right, dtype=torch.float8_e5m2 if gradient == "right" else torch.float8_e4m3fn)
    y = scaled_matmul(a, scale_a, b, scale_b, recipe)
    truth = low_precision.scaled_matmul(a, scale_a.double(), b, scale_b.double(), recipe, dtype=torch.float64)
    assert relative_difference(y, truth) <= 2.0**-8


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("granularity", list(Granularity))
def test_codes_and_scales_are_the_reference_s_bit_for_bit(granularity: Granularity, dtype: torch.dtype) -> None:
    """The GPU's own rounding instruction, beside torch's cast; of both signs, and some numbers that are not finite."""
    x = torch.randn(300, 400, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    x = (x.sign() * x.mul(3.0).exp()).bfloat16()
    x.view(-1)[::9973], x.view(-1)[1::9967], x.view(-1)[2::9949] = math.nan, math.inf, -math.inf
    for ours, wanted in zip(
        quantize_fp8(x, granularity, dtype=dtype, transposed=True),
        low_precision.quantize_fp8(x, granularity, dtype=dtype, transposed=True),
        strict=True,
    ):
        assert torch.equal(ours.float().isnan(), wanted.float().isnan())
        assert torch.equal(ours.float().nan_to_num(), wanted.float().nan_to_num())


@pytest.mark.parametrize("transposed", [False, True])
def test_products_by_expert_take_rows_and_gradients_of_any_strides(transposed: bool) -> None:
    """Rows that are part of odd rows; and the gradient of a sum is one number expanded."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(60, 65, generator=generator, device=DEVICE).bfloat16()[:, :64].requires_grad_()
    weights = torch.randn(3, 64, 72, generator=generator, device=DEVICE).bfloat16()
    if transposed:
        weights = weights.transpose(1, 2).contiguous().transpose(1, 2)
    weights.requires_grad_()
    offsets = torch.tensor([0, 17, 17, 60], dtype=torch.int32, device=DEVICE)
    results = []
    for function in (grouped_matmul, reference.grouped_matmul):
        y = function(x, weights, offsets)
        results.append((y, *torch.autograd.grad(y.sum(), [x, weights])))
    for found, wanted in zip(*results, strict=True):
        assert relative_difference(found, wanted) <= 2.0**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [64, 128, 256, 512])
def test_attention_joined_in_place_is_what_it_is_elsewhere(features: int, dtype: torch.dtype) -> None:
    """Bit by bit and many times: warps that share a row must all have read its lse before one writes over it."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    outputs = [torch.randn(4, 16, 512, features, generator=generator, device=DEVICE).to(dtype) for _ in range(2)]
    lses = [torch.randn(4, 16, 512, generator=generator, device=DEVICE) for _ in range(2)]
    out, lse = merge_attention(outputs, lses)
    for _ in range(50):
        found, of_found = merge_attention([outputs[0].clone(), outputs[1]], [lses[0].clone(), lses[1]], overwrite=True)
        assert torch.equal(found, out) and torch.equal(of_found, lse)
