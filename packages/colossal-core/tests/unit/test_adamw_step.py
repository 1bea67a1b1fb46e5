"""The AdamW step, its reference and the one by torch's fused kernel (which runs on the CPU too), against torch's own optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from colossal_core import tensor_lists
from colossal_core.ops import build_op_table, narrow
from colossal_core.ops.reference import AdamWSettings, adamw_step, adamw_step_fused, reference_ops, torch_ops
from colossal_core.rounding import BLOCK, FIRST_MOMENT, SECOND_MOMENT, Code, Coded

Step = Callable[..., None]
STEPS = [adamw_step, adamw_step_fused]

SETTINGS = AdamWSettings(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
SHAPES = [(4, 3), (7,), (), (0,), (2, 2, 2)]


def draw(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


@pytest.mark.parametrize("group_elements", [1, 10, 1 << 26])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("adamw_step", STEPS)
def test_equals_torchs_adamw_to_the_last_digits(
    adamw_step: Step, group_elements: int, clipped: bool, with_skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_lists, "GROUP_ELEMENTS", group_elements)
    ours = draw(0)
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in ours]
    oracle = torch.optim.AdamW(theirs, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    exp_avgs, exp_avg_sqs = [torch.zeros_like(p) for p in ours], [torch.zeros_like(p) for p in ours]
    for step in range(1, 11):
        grads = draw(step)
        kept = [grad.clone() for grad in grads]
        factor = torch.tensor(0.3, dtype=torch.float64) if clipped else None
        adamw_step(
            ours,
            grads,
            exp_avgs,
            exp_avg_sqs,
            settings=SETTINGS,
            step=torch.tensor(step),
            clip=factor,
            skip=torch.tensor(False) if with_skip else None,
        )
        assert all(torch.equal(grad, before) for grad, before in zip(grads, kept, strict=True))
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad * 0.3 if clipped else grad
        oracle.step()
    for index, parameter in enumerate(theirs):
        torch.testing.assert_close(ours[index], parameter.detach(), rtol=1e-15, atol=1e-16)
        state = oracle.state[parameter]
        torch.testing.assert_close(exp_avgs[index], state["exp_avg"], rtol=1e-15, atol=1e-16)
        torch.testing.assert_close(exp_avg_sqs[index], state["exp_avg_sq"], rtol=1e-15, atol=1e-16)


@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1.0])
@pytest.mark.parametrize("adamw_step", STEPS)
def test_a_skipped_step_changes_no_bit(adamw_step: Step, step: int, poison: float) -> None:
    params, exp_avgs, exp_avg_sqs = draw(0), draw(1), [tensor.square() for tensor in draw(2)]
    exp_avgs[0].zero_()
    exp_avg_sqs[0].zero_()
    before = [tensor.clone() for tensor in (*params, *exp_avgs, *exp_avg_sqs)]
    adamw_step(
        params,
        [torch.full_like(tensor, poison) for tensor in params],
        exp_avgs,
        exp_avg_sqs,
        settings=SETTINGS,
        step=torch.tensor(step),
        clip=torch.tensor(math.nan),
        skip=torch.tensor(True),
    )
    for after, old in zip((*params, *exp_avgs, *exp_avg_sqs), before, strict=True):
        assert torch.equal(after, old)


@pytest.mark.parametrize("adamw_step", STEPS)
def test_float32_stays_near_float64(adamw_step: Step) -> None:
    narrow = [tensor.float() for tensor in draw(0)]
    wide = [tensor.double() for tensor in narrow]
    states = [[torch.zeros_like(p) for p in narrow] for _ in range(2)]
    wide_states = [[torch.zeros_like(p) for p in wide] for _ in range(2)]
    for step in range(1, 6):
        grads = [grad.float() for grad in draw(step)]
        adamw_step(narrow, grads, *states, settings=SETTINGS, step=torch.tensor(step))
        adamw_step(wide, [g.double() for g in grads], *wide_states, settings=SETTINGS, step=torch.tensor(step))
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("adamw_step", STEPS)
def test_copies_get_the_new_values(adamw_step: Step, skipped: bool) -> None:
    """Gradients narrower than parameters are widened first; copies are to the nearest, in a skipped step of what is left as it was."""
    params, grads = [tensor.float() for tensor in draw(0)], [tensor.bfloat16() for tensor in draw(1)]
    states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    same, same_states = [p.clone() for p in params], [[torch.zeros_like(p) for p in params] for _ in range(2)]
    copies = [torch.full_like(p, math.nan, dtype=torch.bfloat16) for p in params]
    given = {"settings": SETTINGS, "step": torch.tensor(1), "skip": torch.tensor(skipped)}
    adamw_step(params, grads, *states, **given, copies=copies)
    adamw_step(same, [grad.float() for grad in grads], *same_states, **given)
    assert all(torch.equal(one, other) for one, other in zip(params, same, strict=True))
    assert all(torch.equal(copy, param.bfloat16()) for copy, param in zip(copies, params, strict=True))


@pytest.mark.parametrize("chunk_elements", [256, 512, 1 << 24])
@pytest.mark.parametrize("adamw_step", STEPS)
def test_narrow_lists_are_each_rounded_once(
    adamw_step: Step, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 parameters and codes, cut into chunks anywhere: neighbours of what the wide step gives; by the seed; not in a skipped step."""
    monkeypatch.setattr(narrow, "CHUNK_ELEMENTS", chunk_elements)
    sizes = (3, 700, 256, 1030)
    wide = [torch.randn(size, generator=torch.Generator().manual_seed(size)).bfloat16().float() for size in sizes]
    grads = [tensor * 0.1 for tensor in wide]

    def kept() -> tuple[list[torch.Tensor], list[Coded], list[Coded]]:
        return [tensor.bfloat16() for tensor in wide], zeros(FIRST_MOMENT, sizes), zeros(SECOND_MOMENT, sizes)

    def run(seed: int, *, skip: bool = False) -> tuple[list[torch.Tensor], list[Coded], list[Coded]]:
        lists = kept()
        adamw_step(
            lists[0], grads, *lists[1:], settings=SETTINGS, step=torch.tensor(1), skip=torch.tensor(skip), seed=seed
        )
        return lists

    exact, states = [tensor.clone() for tensor in wide], [[torch.zeros_like(p) for p in wide] for _ in range(2)]
    adamw_step(exact, grads, *states, settings=SETTINGS, step=torch.tensor(1))
    ours, again, other, skipped = run(1), run(1), run(2), run(1, skip=True)
    for one, same, wanted in zip(ours[0], again[0], exact, strict=True):
        assert torch.equal(one, same)
        assert ((one.float() - wanted).abs() <= 2.0**-7 * wanted.abs() + 1e-6).all()
    assert any(not torch.equal(one, found) for one, found in zip(ours[0], other[0], strict=True))
    assert all(torch.equal(one.float(), before) for one, before in zip(skipped[0], wide, strict=True))
    assert not any(found.codes.any() or found.scales.any() for found in (*skipped[1], *skipped[2]))
    for found, wanted in zip((*ours[1], *ours[2]), (*states[0], *states[1]), strict=True):
        blocks = torch.nn.functional.pad(wanted, (0, len(found.codes) - found.numel)).view(-1, BLOCK)
        assert torch.equal(found.scales, blocks.abs().amax(1))


def zeros(code: Code, sizes: tuple[int, ...]) -> list[Coded]:
    padded = [-(-size // BLOCK) for size in sizes]
    return [
        Coded(torch.zeros(blocks * BLOCK, dtype=code.dtype), torch.zeros(blocks), code, size)
        for blocks, size in zip(padded, sizes, strict=True)
    ]


@pytest.mark.parametrize(
    ("device_type", "dtype", "provider"),
    [("cuda", "bfloat16", "torch_fused"), ("cuda", "float64", "reference"), ("cpu", "float32", "reference")],
)
def test_where_torchs_kernel_is_chosen(device_type: str, dtype: str, provider: str) -> None:
    table = build_op_table((*reference_ops(), *torch_ops()), device_type, dtype)
    assert table.providers()["adamw_step"] == provider


@pytest.mark.parametrize("adamw_step", STEPS)
def test_no_parameters_is_no_work(adamw_step: Step) -> None:
    adamw_step([], [], [], [], settings=SETTINGS, step=torch.tensor(1))
