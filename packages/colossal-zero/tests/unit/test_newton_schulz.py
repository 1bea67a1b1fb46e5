"""The two forms of Muon's iteration are one polynomial, and the cheaper one is as near to the polar factor in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from colossal_core.testing import relative_difference
from colossal_zero.optimizers.newton_schulz import (
    flops,
    gram_flops,
    gram_form_saves,
    gram_iteration,
    orthogonalise,
    plain_flops,
    plain_iteration,
)

Form = Callable[[torch.Tensor], torch.Tensor]
SHAPES = [(16, 44), (32, 64), (64, 176), (96, 160), (128, 352)]
SMALL_SHAPES = [(2, 6), (3, 8), (4, 300), (8, 24)]
CONDITIONS = [1.0, 3.0, 10.0, 100.0, 1e3, 1e4, 1e6]
POWERS = [0.5, 1.0, 2.0]


def with_values(shape: tuple[int, int], values: torch.Tensor, seed: int) -> torch.Tensor:
    """A random matrix [1, m, n] with these singular values, in float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(drawn, full_matrices=False)
    found: torch.Tensor = left @ torch.diag(values) @ right
    return found[None]


def drawn_matrices(shape: tuple[int, int], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, matrix of norm 1): normal ones, geometric sequences of singular values, and powers of their number."""
    generator = torch.Generator().manual_seed(seed)
    yield "normal", unit(torch.randn((1, *shape), generator=generator, dtype=torch.float64))
    for condition in CONDITIONS[1:]:
        exponents = torch.linspace(0.0, 1.0, shape[0], dtype=torch.float64)
        yield f"condition {condition:g}", unit(with_values(shape, condition**-exponents, seed))
    for power in POWERS:
        numbers = torch.arange(1, shape[0] + 1, dtype=torch.float64)
        yield f"power -{power}", unit(with_values(shape, numbers**-power, seed))


def unit(matrix: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
    return matrix / norms


def polar_factor(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found: torch.Tensor = left @ right
    return found


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_are_one_polynomial(shape: tuple[int, int], condition: float) -> None:
    """In float64 they differ by rounding."""
    exponents = torch.linspace(0.0, 1.0, shape[0], dtype=torch.float64)
    matrix = unit(with_values(shape, condition**-exponents, 0))
    assert relative_difference(gram_iteration(matrix), plain_iteration(matrix)) <= 1e-12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_in_bf16_the_gram_form_is_as_near_to_the_polar_factor_as_the_plain_one(
    shape: tuple[int, int], seed: int
) -> None:
    for name, matrix in drawn_matrices(shape, seed):
        rounded, polar = matrix.bfloat16(), polar_factor(matrix)
        gram, plain = (float((form(rounded).double() - polar).norm()) for form in (gram_iteration, plain_iteration))
        assert gram <= 1.1 * plain, (name, gram, plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bf16_the_gram_form_is_nearer_to_the_exact_iteration_than_the_plain_one(shape: tuple[int, int]) -> None:
    for name, matrix in drawn_matrices(shape, 0):
        rounded = matrix.bfloat16()
        exact = plain_iteration(rounded.double())
        gram, plain = (float((form(rounded).double() - exact).norm()) for form in (gram_iteration, plain_iteration))
        assert gram <= plain, (name, gram, plain)


@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_in_bf16_the_gram_form_never_diverges(shape: tuple[int, int]) -> None:
    """With few singular values each can lie where rounding counts most: ten times bfloat16's precision."""
    for seed in range(20):
        for name, matrix in drawn_matrices(shape, seed):
            rounded = matrix.bfloat16()
            difference = float((gram_iteration(rounded).double() - plain_iteration(rounded.double())).norm())
            assert difference <= 10 * 2**-8 * shape[0] ** 0.5, (seed, name, difference)


def test_operations_are_counted_and_the_cheaper_form_is_used() -> None:
    """In units of d^3: of a square, of Llama's d x 2.75 d, and of d x 4 d."""
    forms = (plain_flops, gram_flops, flops)
    assert [form((64, 64)) / 64**3 for form in forms] == [30.0, 36.0, 30.0]
    assert [form((64, 176)) / 64**3 for form in forms] == [65.0, 50.0, 50.0]
    assert [form((256, 64)) / 64**3 for form in forms] == [90.0, 60.0, 60.0]
    assert [gram_form_saves((64, width)) for width in (64, 95, 96, 97, 176)] == [False, False, False, True, True]


@pytest.mark.parametrize(("shape", "form"), [((16, 24), plain_iteration), ((16, 25), gram_iteration)])
@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
def test_a_batch_takes_the_form_of_its_shape(shape: tuple[int, int], form: Form, tall: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn((3, *shape), generator=generator, dtype=torch.float64)
    found = orthogonalise(matrices.mT.contiguous() if tall else matrices)
    assert found.is_contiguous()
    assert relative_difference(found.mT if tall else found, form(unit(matrices))) <= 1e-14


def test_a_matrix_of_zeros_stays_one() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        assert not orthogonalise(torch.zeros((2, 8, 24), dtype=dtype)).any()
