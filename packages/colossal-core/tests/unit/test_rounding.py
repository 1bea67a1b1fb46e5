"""What is kept narrower than it is computed in: unbiased, as near as its format allows, and the same where it is read and written again."""

from __future__ import annotations

import pytest
import torch

from colossal_core.rounding import BLOCK, FIRST_MOMENT, SECOND_MOMENT, Code, keyed_generator, round_to_bf16

CPU = torch.device("cpu")


def test_bf16_is_one_of_two_neighbours_and_right_on_average() -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 1e-3
    drawn = torch.stack([round_to_bf16(values, keyed_generator(CPU, 1, draw)).float() for draw in range(2000)])
    spacing = 2.0 ** (torch.floor(torch.log2(values.abs())) - 7)
    assert ((drawn - values).abs() < spacing).all()
    assert len(set(drawn[:, 0].tolist())) == 2
    assert ((drawn.mean(0) - values).abs() < 5 * spacing / 2 / 2000**0.5).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.5, 3.0e38, float("inf"), float("-inf")])
def test_what_bf16_holds_is_not_changed(value: float) -> None:
    held = torch.full((1000,), value).bfloat16()
    assert torch.equal(round_to_bf16(held.float(), keyed_generator(CPU, 0)), held)


def test_nan_stays_nan() -> None:
    assert round_to_bf16(torch.full((100,), float("nan")), keyed_generator(CPU, 0)).isnan().all()


def test_generators_differ_by_every_part_of_the_key() -> None:
    keys = [(0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b")]
    drawn = [torch.rand(4, generator=keyed_generator(CPU, *key)) for key in keys]
    assert torch.equal(drawn[0], torch.rand(4, generator=keyed_generator(CPU, *keys[0])))
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])


def values_for(code: Code) -> torch.Tensor:
    """Four blocks whose elements spread over six decades."""
    generator = torch.Generator().manual_seed(0)
    values = 10.0 ** (-6 * torch.rand(4 * BLOCK, generator=generator))
    sign = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    return values if code.positive else values * sign


@pytest.mark.parametrize("code", [FIRST_MOMENT, SECOND_MOMENT])
def test_codes_are_right_on_average(code: Code) -> None:
    values = values_for(code)
    drawn = torch.stack(
        [code.decode(*code.encode(values, keyed_generator(CPU, 2, draw))) for draw in range(500)]
    ).double()
    scale = values.abs().double().view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)
    lower = (code.levels * (values.abs() / scale) ** (1 / code.power)).floor()
    gap = scale * ((lower + 1) ** code.power - lower**code.power) / code.levels**code.power
    seen = lower >= 1  # below, the smallest code of a second moment stands for all
    assert ((drawn - values).abs() <= gap * 1.001)[:, seen].all()
    assert ((drawn.mean(0) - values).abs() <= 5 * gap / 2 / 500**0.5)[seen].all()


@pytest.mark.parametrize("code", [FIRST_MOMENT, SECOND_MOMENT])
def test_what_codes_stand_for_is_given_the_same_codes(code: Code) -> None:
    codes, scales = code.encode(values_for(code), keyed_generator(CPU, 3))
    again, same = code.encode(code.decode(codes, scales), keyed_generator(CPU, 4))
    assert torch.equal(codes, again)
    assert torch.equal(scales, same)


def test_a_second_moment_is_never_zero_beside_a_larger_one() -> None:
    values = torch.zeros(2 * BLOCK)
    values[0] = 1.0
    decoded = SECOND_MOMENT.decode(*SECOND_MOMENT.encode(values, keyed_generator(CPU, 0)))
    assert decoded[0] == 1.0
    assert (decoded[:BLOCK] > 0).all()
    assert (decoded[1:BLOCK] < 1e-9).all()
    assert (decoded[BLOCK:] == 0).all()
