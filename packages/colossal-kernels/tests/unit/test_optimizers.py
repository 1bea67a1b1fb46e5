"""Optimizer steps over many tensors in one launch, in the interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import pytest
import torch

from colossal_core.ops.adamw import AdamWSettings
from colossal_core.ops.lion import LionSettings
from colossal_core.ops.reference import reference_ops
from colossal_core.ops.sgd import SGDSettings
from colossal_core.rounding import BLOCK, FIRST_MOMENT, SECOND_MOMENT, Code, Coded, keyed_generator
from colossal_core.testing import OpSuite
from colossal_kernels.optimizers import tables
from colossal_kernels.table import implementations

Tensors = list[torch.Tensor]
OURS: dict[str, Any] = {found.op: found.function for found in implementations() if found.provider == "triton"}
REFERENCE = {found.op: found.function for found in reference_ops()}
SETTINGS = AdamWSettings(lr=1e-2, beta2=0.95, weight_decay=0.1)
SHAPES = [(3, 5), (), (1030,), (2, 1024)]


class TestAdamWStep(OpSuite):
    implementation = next(f for f in implementations() if (f.op, f.provider) == ("adamw_step", "triton"))
    dtypes = ("float32", "float16")


class TestLionStep(OpSuite):
    implementation = next(f for f in implementations() if (f.op, f.provider) == ("lion_step", "triton"))
    dtypes = ("float32", "float16")


class TestSGDStep(OpSuite):
    implementation = next(f for f in implementations() if (f.op, f.provider) == ("sgd_step", "triton"))
    dtypes = ("float32", "float16")


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def copied(lists: tuple[Any, ...]) -> list[Any]:
    return [None if found is None else [tensor.clone() for tensor in found] for found in lists]


def cases() -> list[Any]:
    """(op, its lists but for gradients, its keywords)."""
    squares = [tensor.square() for tensor in drawn(4)]
    return [
        pytest.param("adamw_step", (drawn(3), squares), {"settings": SETTINGS, "step": torch.tensor(7.0)}, id="adamw"),
        pytest.param("lion_step", (drawn(3),), {"settings": LionSettings(1e-2, weight_decay=0.1)}, id="lion"),
        pytest.param("sgd_step", (drawn(3),), {"settings": SGDSettings(1e-2, 0.9, 0.1)}, id="sgd"),
        pytest.param("sgd_step", (None,), {"settings": SGDSettings(1e-2, 0.0, 0.1)}, id="plain sgd"),
    ]


@pytest.mark.parametrize(("op", "moments", "keywords"), cases())
def test_mixed_dtypes_and_copies_in_one_pass(op: str, moments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """float16 gradients, float32 masters, copies in float16: to the last bits the float64 step on the same numbers."""
    grads, clip = drawn(2, torch.float16), torch.tensor(0.3)
    params, states = drawn(1), copied(moments)
    copies = [torch.full_like(param, math.nan, dtype=torch.float16) for param in params]
    OURS[op](params, grads, *states, **keywords, clip=clip, skip=torch.tensor(False), copies=copies)
    wide = [[tensor.double() for tensor in drawn(1)], [grad.double() for grad in grads]]
    wide_states = [None if found is None else [tensor.double() for tensor in found] for found in moments]
    REFERENCE[op](*wide, *wide_states, **keywords, clip=clip.double())
    for found, wanted in zip([params, *states], [wide[0], *wide_states], strict=True):
        for ours, exact in zip(found or (), wanted or (), strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=2e-7, atol=2e-7)
    assert all(torch.equal(copy, param.half()) for copy, param in zip(copies, params, strict=True))


@pytest.mark.parametrize(("op", "moments", "keywords"), cases())
def test_a_skipped_step_changes_copies_alone(op: str, moments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    params, states = drawn(1), copied(moments)
    copies = [torch.full_like(param, math.nan, dtype=torch.float16) for param in params]
    grads = [torch.full_like(param, math.nan) for param in params]
    OURS[op](params, grads, *states, **keywords, clip=torch.tensor(math.inf), skip=torch.tensor(True), copies=copies)
    for found, kept in zip([params, *states], [drawn(1), *moments], strict=True):
        assert all(torch.equal(ours, before) for ours, before in zip(found or (), kept or (), strict=True))
    assert all(torch.equal(copy, param.half()) for copy, param in zip(copies, params, strict=True))


@pytest.mark.parametrize(("op", "moments", "keywords"), cases())
def test_torch_knows_the_operator(op: str, moments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    OURS[op](drawn(1), drawn(2), *copied(moments), **keywords)
    lists = [drawn(1), drawn(2), *(found for found in copied(moments) if found), *([] for found in moments if found)]
    scalars = [torch.tensor(7.0)] if op == "adamw_step" else []
    numbers = [0.9] * 6 + [-0.1] * 2
    name = "plain_sgd_step" if moments[0] is None else op
    operator = getattr(torch.ops.colossal_kernels, name).default
    arguments = (*lists, [torch.zeros_like(p) for p in lists[0]], *scalars, torch.tensor(0.5), None, numbers, None)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 1_000_000])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_bias_corrections_keep_their_digits(step: int, beta: float) -> None:
    """A parameter of 0 shows the update alone."""
    settings = AdamWSettings(lr=1.0, beta1=beta, beta2=beta)
    ours, exact = [[torch.zeros(4)] for _ in range(3)], [[torch.zeros(4).double()] for _ in range(3)]
    grads = [torch.tensor([1.0, -2.0, 0.5, 3e-3])]
    OURS["adamw_step"](ours[0], grads, *ours[1:], settings=settings, step=torch.tensor(float(step)))
    REFERENCE["adamw_step"](exact[0], [grads[0].double()], *exact[1:], settings=settings, step=torch.tensor(step))
    torch.testing.assert_close(ours[0][0].double(), exact[0][0], rtol=1e-6, atol=0.0)


def coded(code: Code, values: Tensors) -> list[Coded]:
    found = []
    for index, tensor in enumerate(values):
        padded = torch.zeros(-(-tensor.numel() // BLOCK) * BLOCK)
        padded[: tensor.numel()] = tensor.flatten()
        found.append(Coded(*code.encode(padded, keyed_generator(torch.device("cpu"), index)), code, tensor.numel()))
    return found


def decoded(kept: Sequence[Coded]) -> Tensors:
    return [item.code.decode(item.codes, item.scales)[: item.numel] for item in kept]


def step_of_codes(seed: int) -> tuple[Tensors, Tensors, Tensors, list[Coded], list[Coded]]:
    """Parameters after a step with coded moments; the moments before rounding; the moments kept."""
    params = drawn(1)
    first, second = coded(FIRST_MOMENT, drawn(3)), coded(SECOND_MOMENT, [tensor.square() for tensor in drawn(4)])
    wide, firsts, seconds = [p.flatten() for p in drawn(1)], decoded(first), decoded(second)
    keywords = {"settings": SETTINGS, "step": torch.tensor(3.0)}
    OURS["adamw_step"](params, drawn(2), first, second, **keywords, seed=seed)
    REFERENCE["adamw_step"](wide, [grad.flatten() for grad in drawn(2)], firsts, seconds, **keywords)
    for ours, exact in zip(params, wide, strict=True):
        torch.testing.assert_close(ours.flatten(), exact, rtol=1e-6, atol=1e-6)
    return params, firsts, seconds, first, second


def test_codes_are_neighbours_of_what_they_stand_for() -> None:
    _, firsts, seconds, first, second = step_of_codes(5)
    for wide, kept in ((firsts, first), (seconds, second)):
        for value, item, found in zip(wide, kept, decoded(kept), strict=True):
            code = item.code
            scale = item.scales.repeat_interleave(BLOCK)[: item.numel]
            low = (code.levels * (value.abs() / scale) ** (1 / code.power)).floor().clamp(max=code.levels - 1)
            gap = ((low + 1) ** code.power - low**code.power) * scale / code.levels**code.power
            assert (value.abs() <= scale * 1.000001).all()
            assert ((found - value).abs() <= 1.001 * gap + 1e-6 * scale).all()


def test_codes_are_right_on_average_and_drawn_by_the_seed() -> None:
    runs = [step_of_codes(seed) for seed in range(6)]
    again = step_of_codes(3)
    assert all(torch.equal(one.codes, other.codes) for one, other in zip(again[3], runs[3][3], strict=True))
    assert any(not torch.equal(one.codes, other.codes) for one, other in zip(runs[4][3], runs[3][3], strict=True))
    for wide, kept in ((runs[0][1], [run[3] for run in runs]), (runs[0][2], [run[4] for run in runs])):
        errors = torch.stack([torch.cat(decoded(found)) - torch.cat(wide) for found in kept])
        assert errors.mean().abs() < 4 * errors.std() / errors.numel() ** 0.5


def test_bf16_is_rounded_without_bias() -> None:
    """What is kept in bf16 is one of two neighbours, and its mean over seeds is the wide value."""
    steps = []
    for seed in range(16):
        params = [torch.full((300,), 1.0, dtype=torch.bfloat16)]
        momenta = [torch.zeros(300, dtype=torch.bfloat16)]
        settings = LionSettings(lr=2.0**-10, beta2=0.9)
        OURS["lion_step"](params, [torch.full((300,), 1.003)], momenta, settings=settings, seed=seed)
        steps.append(torch.stack([params[0].float(), momenta[0].float()]))
    found = torch.stack(steps)
    assert set(found[:, 0].flatten().tolist()) == {1.0, 1.0 - 2.0**-8}
    assert abs(float(found[:, 0].mean()) - (1.0 - 2.0**-10)) < 4 * 2.0**-8 * 0.5 / (16 * 300) ** 0.5
    assert abs(float(found[:, 1].mean()) - 0.1003) < 4 * 2.0**-11 * 0.5 / (16 * 300) ** 0.5
    assert len({tuple(run) for run in found[:, 0].tolist()}) == 16


def test_tensors_anywhere_in_memory() -> None:
    """Not aligned to 16 bytes, not contiguous, in groups of several dtypes: each as if it were alone."""

    def lists() -> list[Tensors]:
        base = drawn(1)[3].flatten()
        odd = [base[1:1100].clone()[1:1099], base[:12].view(3, 4).t(), base[:9].half().clone()]
        return [[tensor.clone(memory_format=torch.preserve_format) for tensor in odd] for _ in range(4)]

    keywords = {"settings": SETTINGS, "step": torch.tensor(2.0)}
    together, alone = lists(), lists()
    together[0][0] = torch.cat([torch.zeros(1), together[0][0]])[1:]
    assert together[0][0].data_ptr() % tables.ALIGNMENT_BYTES == 4
    for some in (together, alone):
        some[3] = [tensor.square() for tensor in some[3]]
    OURS["adamw_step"](*together, **keywords)
    for index in range(3):
        OURS["adamw_step"](*([some[index]] for some in alone), **keywords)
    pairs = zip(chain(*together), chain(*alone), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_steps_repeat_bit_for_bit_from_tables_made_once() -> None:
    lists = [drawn(seed) for seed in (1, 2, 3)] + [[tensor.square() for tensor in drawn(4)]]
    kept = [[tensor.clone() for tensor in found] for found in lists]
    keywords = {"settings": SETTINGS, "step": torch.tensor(2.0)}
    OURS["adamw_step"](*lists, **keywords)
    first = [tensor.clone() for tensor in lists[0]]
    made = tables._rows.cache_info().misses
    for found, before in zip(lists, kept, strict=True):
        torch._foreach_copy_(found, before)
    OURS["adamw_step"](*lists, **keywords)
    assert tables._rows.cache_info().misses == made
    assert all(torch.equal(one, other) for one, other in zip(lists[0], first, strict=True))


def test_who_saved_what_a_step_changes_is_told() -> None:
    params, copies = drawn(1), [param.clone().requires_grad_() for param in drawn(1)]
    squares = [copy.square() for copy in copies]
    given = [copy.detach() for copy in copies]
    moments = coded(FIRST_MOMENT, drawn(3))
    OURS["lion_step"](params, drawn(2), moments, settings=LionSettings(1e-2), copies=given, seed=1)
    for square in squares:
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            square.sum().backward()  # type: ignore[no-untyped-call]
    changed = [*params, *(item.codes for item in moments), *(item.scales for item in moments)]
    assert all(tensor._version for tensor in changed)


def test_rows_of_huge_lists_count_in_64_bits() -> None:
    """Sizes alone: where each tensor's programs start, beyond 2^31 elements."""
    numels = [3 * 2**31, 5, 2**31 + 1]
    rows, _ = tables.device_tables([(16,), (32,), (50,)], numels, 2**20, torch.device("cpu"))
    assert rows[:, tables.NUMEL].tolist() == numels
    assert rows[:, tables.FIRST_PROGRAM].tolist() == [0, 6144, 6145]
    assert rows[:, tables.IS_ALIGNED].tolist() == [1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_no_kernel_takes_goes_to_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []

    def noted(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **keywords: Any) -> None:
            called.append(len(arguments[0]))
            function(*arguments, **keywords)

        return call

    from colossal_core.ops import sgd

    monkeypatch.setattr(sgd, "sgd_step", noted(sgd.sgd_step))
    params = [torch.ones(3, dtype=dtype)]
    OURS["sgd_step"](params, [torch.ones(3, dtype=dtype)], None, settings=SGDSettings(0.5))
    assert called == ([1] if dtype == torch.float64 else [])
    assert params[0].tolist() == [0.5] * 3
