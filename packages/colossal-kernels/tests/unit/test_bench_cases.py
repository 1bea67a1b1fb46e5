"""What the benchmark compares computes the same: the eager form and the formula of every op beside its reference, at small sizes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from colossal_core.ops import OpImplementation
from colossal_core.ops.low_precision import Granularity, Recipe
from colossal_kernels.bench.case import Draw, OpBench, Shape
from colossal_kernels.bench.command import COMPOSED, known_benches
from colossal_kernels.bench.measure import reference_of, resolved, timed_call
from colossal_kernels.bench.outcome import copied, distance, outcome, widened
from colossal_kernels.table import implementations

SMALL: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    **{op: [((5, 24), {})] for op in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "rms_norm_fp8")},
    "rotary": [
        (("", 6, (4, 2), 8), {"in_place": True}),
        (("", 6, (4, 2), 8), {"in_place": False}),
        (("neighbours", 6, (2, 2), 8), {"in_place": False, "interleaved": True}),
    ],
    "cross_entropy": [((20, 30), {}), ((20, 30, ""), {"z_loss": 1e-2, "smoothing": 0.1})],
    "vocabulary_statistics": [((20, 64, 4), {})],
    "vocabulary_gradient": [((20, 64, 4), {})],
    "linear_cross_entropy": [((20, 8, 30), {})],
    "merge_attention": [((3, 2), {}), ((3, 2), {"in_place": True})],
    **{op: [(("some", ((4, 5), (7,))), {})] for op in ("adamw_step", "lion_step", "sgd_step")},
    "symmetric_product": [((2, 5, 7), {}), ((2, 6, 6), {"added": True})],
    "route": [((6, 8, 2), {}), ((6, 8, 2), {"normalize": False})],
    "expert_order": [((6, 4, 2), {}), ((6, 4, 2, 4), {})],
    "expert_permute": [((6, 8, 4, 2), {})],
    "expert_unpermute": [((6, 8, 4, 2), {})],
    "grouped_matmul": [((3, 8, 16, 8), {}), ((3, 8, 16, 8), {"even": False})],
    "experts": [(("small", 6, 16, 8, 4, 2), {})],
    "quantize_fp8": [((16, 256, one), {"transposed": both}) for one in Granularity for both in (False, True)],
    "scaled_matmul": [((16, 32, 128, Recipe.ROW), {})],
    "fp8_linear": [((16,), {})],
    "quantize_blocks": [((512, torch.bfloat16, torch.int8), {}), ((512, torch.float32, torch.float8_e4m3fn), {})],
    "dequantize_blocks_sum": [((3, 512, torch.int8), {})],
}
"""Arguments of `_shape` of the op's file."""


def small_shapes(op: str) -> list[Shape]:
    cases = importlib.import_module(f"colossal_kernels.bench.cases.{op}")
    if op in ("swiglu", "geglu"):
        from colossal_kernels.bench.cases import geglu, swiglu

        gated = [swiglu.gated(3, 10), swiglu.overwritten(3, 10)]
        return gated if op == "swiglu" else [geglu.tanh(gated[0])]
    if op in ("packed_swiglu", "packed_geglu"):
        from colossal_kernels.bench.cases.packed_swiglu import GPT_OSS, packed

        return (
            [packed(3, 10), packed(3, 10, "", **GPT_OSS)]
            if op == "packed_swiglu"
            else [packed(3, 10, approximate="tanh")]
        )
    return [cases._shape(*arguments, **keywords) for arguments, keywords in SMALL[op]]


@pytest.mark.parametrize("op", known_benches())
def test_what_is_compared_computes_the_same(op: str) -> None:
    bench = known_benches()[op]
    for shape in small_shapes(op):
        call = shape.call(Draw(torch.device("cpu")))
        wide = torch.float64 if bench.compared == "float64" else torch.float32
        truth = outcome(reference_of(bench), widened(call, wide), shape.least)
        for function in forms(bench):
            found = outcome(function, copied(call), shape.least)
            assert distance(found, truth) < 0.02, (shape.label, function)
            assert [tensor.shape for tensor in found] == [tensor.shape for tensor in truth]


def forms(bench: OpBench) -> list[Any]:
    return [form for form in (bench.eager, bench.formula) if form is not None]


@pytest.mark.parametrize("implementation", implementations(), ids=lambda found: f"{found.op} by {found.provider}")
def test_ours_takes_what_is_measured(implementation: OpImplementation) -> None:
    """The interpreter truncates where a GPU rounds to bf16, so the bound is a wide one; what is exact is tested beside each kernel."""
    bench = known_benches()[implementation.op]
    shape = small_shapes(implementation.op)[0]
    call = shape.call(Draw(torch.device("cpu")))
    wide = torch.float64 if bench.compared == "float64" else torch.float32
    truth = outcome(reference_of(bench), widened(call, wide), shape.least)
    function = resolved(implementation)
    assert distance(outcome(function, copied(call), shape.least), truth) < 0.02
    for direction in shape.least:
        timed = timed_call(direction, function, copied(call))
        timed()
        timed()


@pytest.mark.parametrize("op", known_benches())
def test_the_least_is_counted_for_every_direction(op: str) -> None:
    for shape in known_benches()[op].shapes:
        assert shape.label.isprintable()
        for least in shape.least.values():
            assert (least.num_bytes > 0) != (least.flops > 0), shape.label
            assert least.formula != ""


def test_what_is_composed_is_no_op() -> None:
    assert [op for op in COMPOSED if op not in known_benches()] == []
