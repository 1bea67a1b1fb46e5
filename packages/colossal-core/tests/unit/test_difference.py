"""The one measure: its formula, its floors, and that nothing that is not a number ever passes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colossal_core.difference import floor_for_gradients, floor_for_parameters, relative_difference


def test_is_its_formula() -> None:
    a, b = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert relative_difference(a, b) == pytest.approx(1 / math.sqrt(30), rel=1e-15)
    assert relative_difference(a, b, floor=10.0) == pytest.approx(0.1, rel=1e-15)
    assert relative_difference(a, a) == 0.0


def test_sees_the_last_bit_of_float64() -> None:
    b = torch.ones(4, dtype=torch.float64)
    a = b.clone()
    a[2] += 2.0**-52
    assert relative_difference(a, b) == 2.0**-53


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    good, broken = torch.ones(3), torch.tensor([1.0, bad, 1.0])
    for a, b in ((good, broken), (broken, good), (broken, broken)):
        assert relative_difference(a, b, floor=1e300) == math.inf


def test_zero_against_zero_passes_and_against_something_does_not() -> None:
    zero, something = torch.zeros(3), torch.full((3,), 1e-30)
    assert relative_difference(zero, zero) == 0.0
    assert relative_difference(something, zero) == math.inf
    assert relative_difference(something, zero, floor=1e-3) < 1e-12
    assert relative_difference(torch.zeros(0), torch.zeros(0)) == 0.0


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError) as caught:
        relative_difference(torch.ones(3), torch.ones(1, 3))
    assert str(caught.value).startswith("shapes (3,) and (1, 3)")


@given(st.floats(-300, 300), st.floats(0, 3))
def test_does_not_depend_on_the_scale(exponent: float, angle: float) -> None:
    b = torch.tensor([3.0, -4.0], dtype=torch.float64)
    a = b + math.cos(angle)
    scale = 10.0**exponent
    assert relative_difference(a * scale, b * scale) == pytest.approx(relative_difference(a, b), rel=1e-13)


def test_floors() -> None:
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]]), torch.zeros(0)]
    assert floor_for_gradients(gradients) == pytest.approx(5e-3, rel=1e-15)
    assert floor_for_gradients([]) == 0.0
    assert floor_for_parameters(400) == pytest.approx(0.02, rel=1e-15)
