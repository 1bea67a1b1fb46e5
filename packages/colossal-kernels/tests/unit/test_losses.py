"""Losses over a vocabulary in the interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from colossal_core.ops import OpImplementation, reference
from colossal_core.ops.reference import LossTerms, Words
from colossal_core.testing import OpSuite
from colossal_kernels.losses import in_place, scaling
from colossal_kernels.losses import linear_cross_entropy as linear_module
from colossal_kernels.losses import rows as rows_module
from colossal_kernels.losses.cross_entropy import cross_entropy
from colossal_kernels.losses.in_place import InPlaceConfig
from colossal_kernels.losses.linear_cross_entropy import Chunks, chunks_of, linear_cross_entropy
from colossal_kernels.losses.vocabulary import vocabulary_gradient, vocabulary_statistics
from colossal_kernels.table import implementations

UNDER_THE_INTERPRETER = ("test_schema", "test_autograd_registration", "test_faketensor")
TERMS: dict[str, Any] = {"z_loss": 0.1, "smoothing": 0.2}


def implementation_of(op: str) -> OpImplementation:
    return next(found for found in implementations() if found.op == op)


class TestCrossEntropy(OpSuite):
    implementation = implementation_of("cross_entropy")
    dtypes = ("float32", "float16")


class TestVocabularyStatistics(OpSuite):
    implementation = implementation_of("vocabulary_statistics")
    dtypes = ("float32", "float16")


class TestVocabularyGradient(OpSuite):
    implementation = implementation_of("vocabulary_gradient")
    dtypes = ("float32", "float16")


class TestLinearCrossEntropy(OpSuite):
    implementation = implementation_of("linear_cross_entropy")
    dtypes = ("float32", "float16")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a row is many blocks and many parts."""
    for name, value in (("READ_BLOCK", 8), ("WRITE_BLOCK", 8), ("MERGE_ROWS", 2)):
        monkeypatch.setattr(rows_module, name, value)
    monkeypatch.setattr(in_place, "in_place_config", lambda _row_bytes: InPlaceConfig(16, 4, 2))


@pytest.mark.parametrize("programs", [1, 8, 64], ids=["one part", "a few parts", "a part for each block"])
def test_a_row_of_many_blocks(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    monkeypatch.setattr(rows_module, "READ_PROGRAMS", programs)
    logits, labels = (4.0 * normal(3, 61)).requires_grad_(), torch.tensor([60, -100, 17])
    total, count = cross_entropy(logits, labels, **TERMS)
    (ours,) = torch.autograd.grad(total, logits)
    wide = logits.detach().double().requires_grad_()
    expected, _ = reference.cross_entropy(wide, labels, **TERMS)
    (theirs,) = torch.autograd.grad(expected, wide)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    assert int(count) == 2
    assert not ours[1].any()


def test_a_loss_in_place_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    hidden, weight = normal(5, 4).requires_grad_(), normal(61, 4)
    labels = torch.tensor([60, -100, 17, 0, 16])
    total = linear_cross_entropy(hidden, weight, labels, **TERMS)
    (ours,) = torch.autograd.grad(total, hidden)
    wide = hidden.detach().double().requires_grad_()
    expected = reference.linear_cross_entropy(wide, weight.double(), labels, **TERMS)
    (theirs,) = torch.autograd.grad(expected, wide)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_parts_keep_the_gpu_busy_and_are_whole_blocks() -> None:
    assert rows_module.parts_of_a_row(8192, 128256) == (1, 32 * 4096)
    assert rows_module.parts_of_a_row(263, 128256) == (3, 11 * 4096)
    assert rows_module.parts_of_a_row(1, 128256) == (32, 4096)
    assert rows_module.parts_of_a_row(1, 10) == (1, 4096)
    assert rows_module.parts_of_a_row(5, 0) == (1, 4096)


@pytest.mark.parametrize("overwrite", [False, True])
def test_ignored_rows_have_no_gradient_whatever_they_hold(overwrite: bool) -> None:
    logits = torch.tensor([[math.nan] * 5, [math.inf] * 5, [0.0] * 5], requires_grad=True)
    total, count = cross_entropy(logits * 1.0, torch.tensor([-100, -100, 1]), overwrite=overwrite)
    (gradient,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(total, torch.tensor(math.log(5.0)))
    assert int(count) == 1
    assert torch.equal(gradient[:2], torch.zeros(2, 5))
    torch.testing.assert_close(gradient[2], torch.tensor([0.2, -0.8, 0.2, 0.2, 0.2]))


def test_ignored_rows_of_a_projection_have_no_gradient_whatever_they_hold() -> None:
    hidden = torch.tensor([[math.nan, 0.0], [1.0, 2.0]], requires_grad=True)
    weight = normal(5, 2)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, torch.tensor([-100, 3])), hidden)
    assert torch.equal(gradient[0], torch.zeros(2))
    assert bool(gradient[1].isfinite().all())


INF, NAN = math.inf, math.nan


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize(
    "row",
    [
        [-INF] * 12 + [1.0],
        [-INF] * 13,
        [1.0] * 5 + [INF] + [2.0] * 7,
        [INF] * 13,
        [1.0] * 12 + [NAN],
        [-3e38] * 12 + [3e38],
    ],
    ids=["all but one -inf", "all -inf", "one inf", "all inf", "nan", "the range of float32"],
)
def test_what_is_not_finite_is_the_reference_s(row: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    label = torch.tensor([12])
    ours, theirs = (torch.tensor([row], requires_grad=True) for _ in range(2))
    found, expected = cross_entropy(ours, label)[0], reference.cross_entropy(theirs, label)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    (of_ours,), (of_theirs,) = torch.autograd.grad(found, ours), torch.autograd.grad(expected, theirs)
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
    given = (torch.tensor([row]), label, Words(0, 13, 13), LossTerms())
    numbers, expected = vocabulary_statistics(*given), reference.vocabulary_statistics(*given)
    known = slice(1 if row[-1] != row[-1] else 0, None)  # the largest logit beside NaN is any
    assert torch.equal(numbers[known].nan_to_num(-1.0), expected[known].nan_to_num(-1.0))


def test_a_label_that_is_no_word_is_no_silent_zero() -> None:
    for label in (5, -1):
        assert math.isnan(float(cross_entropy(torch.zeros(1, 5), torch.tensor([label]))[0]))
        assert math.isnan(float(linear_cross_entropy(torch.zeros(1, 2), torch.zeros(5, 2), torch.tensor([label]))))
        hidden = torch.zeros(1, 2, requires_grad=True)
        assert math.isnan(float(linear_cross_entropy(hidden, torch.zeros(5, 2), torch.tensor([label])).detach()))


def test_rows_more_than_2_31_elements_apart() -> None:
    """4 GiB of addresses, of which only two pages are ever touched."""
    stride, labels = 2**31 + 8, torch.tensor([1, 6])
    apart = torch.empty(stride + 8, dtype=torch.float16).as_strided((2, 7), (stride, 1))
    near = normal(2, 7, dtype=torch.float16).requires_grad_()
    apart.copy_(near.detach()).requires_grad_()
    for overwrite in (False, True):
        (found,) = torch.autograd.grad(cross_entropy(apart, labels, overwrite=overwrite)[0], apart)
        (expected,) = torch.autograd.grad(cross_entropy(near, labels)[0], near)
        assert torch.equal(found, expected)
    apart.detach().copy_(near.detach())
    in_place.write_losses_and_gradients(apart.detach(), labels, LossTerms(), torch.empty(2))
    assert torch.equal(apart, expected)


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    leaf = normal(3, 7).requires_grad_()
    logits = leaf * 1.0
    address = logits.data_ptr()
    total, _ = cross_entropy(logits, torch.tensor([1, 2, 3]), overwrite=True)
    (gradient,) = torch.autograd.grad(total, logits, retain_graph=True)
    assert gradient.data_ptr() == address
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        torch.autograd.grad(total, logits)
    expected, _ = reference.cross_entropy(leaf, torch.tensor([1, 2, 3]))
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


@pytest.mark.parametrize("overwrite", [False, True])
def test_rows_of_one_word_and_rows_that_overlap(overwrite: bool) -> None:
    """One column may have any stride, and of rows in one place none may be written before the others are read."""
    one = normal(1, 4).t().requires_grad_()
    (found,) = torch.autograd.grad(cross_entropy(one, torch.zeros(4, dtype=torch.int64), overwrite=overwrite)[0], one)
    assert torch.equal(found, torch.zeros(4, 1))
    leaf, labels = normal(1, 5).requires_grad_(), torch.tensor([1, 2, 3])
    logits = (leaf * 1.0).expand(3, 5)
    (found,) = torch.autograd.grad(cross_entropy(logits, labels, overwrite=overwrite)[0], leaf)
    expected, _ = reference.cross_entropy(leaf.expand(3, 5), labels)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaf)[0])


def test_a_gradient_of_the_gradient_is_an_error() -> None:
    logits = normal(3, 5).requires_grad_()
    total, _ = cross_entropy(logits, torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match="the kernel cross_entropy has no second derivative"):
        torch.autograd.grad(total, logits, create_graph=True)


def test_a_second_backward_pass_through_a_projection_is_an_error() -> None:
    hidden = normal(3, 7).requires_grad_()
    total = linear_cross_entropy(hidden, normal(5, 7), torch.tensor([1, 2, 3]))
    torch.autograd.grad(total, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        torch.autograd.grad(total, hidden)


def test_a_rank_without_words_knows_nothing() -> None:
    found = vocabulary_statistics(torch.full((2, 3), 9.0), torch.tensor([0, -100]), Words(4, 4, 4), LossTerms())
    assert torch.equal(found, torch.tensor([[-INF, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    given = (torch.ones(()), torch.full((2, 3), 9.0), torch.tensor([0, 1]), torch.ones(2))
    assert not vocabulary_gradient(*given, Words(4, 4, 4), LossTerms()).any()


@pytest.mark.parametrize("narrow", [True, False], ids=["in the weight's dtype", "in float32"])
def test_the_weight_s_gradient_over_many_chunks(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven chunks in float16, and in float32 by slices: at most twice the reference's error."""
    monkeypatch.setattr(linear_module, "MOST_NARROW_SUMS", 32 if narrow else 0)
    monkeypatch.setattr(linear_module, "SLICE_BYTES", 2 * 8 * 10)
    hidden, labels = normal(64, 8, dtype=torch.float16), torch.arange(64) % 37
    truth = gradient_of(reference.linear_cross_entropy, hidden.double(), labels, 6 * 37 * 8)
    ours = gradient_of(linear_cross_entropy, hidden, labels, 6 * 37 * 2)
    theirs = gradient_of(reference.linear_cross_entropy, hidden, labels, 6 * 37 * 2)
    assert ours.dtype == torch.float16
    assert (ours.double() - truth).norm() <= (2.0 if narrow else 1.2) * (theirs.double() - truth).norm()


def gradient_of(op: Any, hidden: Tensor, labels: Tensor, budget_bytes: int) -> Tensor:
    weight = normal(37, 8, dtype=torch.float16).to(hidden.dtype).requires_grad_()
    (found,) = torch.autograd.grad(op(hidden, weight, labels, budget_bytes=budget_bytes), weight)
    return found


def test_chunks_fill_the_gpu_within_the_budget() -> None:
    llama = (4096, 128256)
    assert chunks_of(8192, *llama, 448 * 2**20 // (128256 * 2)) == Chunks(1664, 3)
    assert chunks_of(8192, *llama, 512 * 2**20 // (128256 * 2)) == Chunks(2048, 1)
    assert chunks_of(8192, 4096, 128257, 448 * 2**20 // (128257 * 2)) == Chunks(1792, 1)
    assert chunks_of(1000, *llama, 1831) == Chunks(1000, 1)
    assert chunks_of(1000, *llama, 100) == Chunks(100, 1)
    for most in range(1, 3000, 37):
        found = chunks_of(100_000, *llama, most)
        held = found.rows * (128256 + (found.parts * 4096 if found.parts > 1 else 0))
        assert most // 2 <= found.rows <= most
        assert held <= most * 128256


def test_the_hidden_states_gradient_in_parts_is_the_reference_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "chunks_of", lambda *_: Chunks(2, 3))
    hidden, weight, labels = normal(5, 4).requires_grad_(), normal(24, 4), torch.tensor([23, -100, 17, 0, 8])
    (ours,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)
    wide = hidden.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(reference.linear_cross_entropy(wide, weight.double(), labels), wide)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_a_tensor_is_scaled_in_its_place_and_rounded_once(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "SCALE_BLOCK", 8)
    monkeypatch.setattr(scaling, "SCALE_PROGRAMS", 2)
    tensor = normal(7, 5, dtype=torch.float16)
    expected = (tensor.float() * factor).half()
    scaled = scaling.scale_in_place(tensor, torch.tensor([factor]))
    assert scaled is tensor
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("columns", [3, 9, 37, 64])
@pytest.mark.parametrize("begin", range(4))
def test_rows_that_begin_anywhere(columns: int, begin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their whole blocks begin at multiples of 16 bytes, and nothing beside a row is touched."""
    small_blocks(monkeypatch)
    monkeypatch.setattr(rows_module, "READ_PROGRAMS", 8)
    plain, labels = normal(3, columns), torch.tensor([columns - 1, -100, 0])
    given = (torch.ones(()), plain, labels, torch.ones(3), Words(0, columns, columns), LossTerms(-100, 0.1, 0.2))
    expected = reference.vocabulary_gradient(*given)
    memory = torch.full((3 * (columns + 1) + 8,), 7.0)
    rows = memory.as_strided((3, columns), (columns + 1, 1), begin)
    rows.copy_(plain)
    assert rows_module.has_heads(columns, rows) or columns % 16 == 0
    statistics = vocabulary_statistics(rows, labels, *given[4:])
    torch.testing.assert_close(
        statistics, reference.vocabulary_statistics(plain, labels, *given[4:]), rtol=1e-6, atol=1e-6
    )
    vocabulary_gradient(given[0], rows, *given[2:], overwrite=True)
    torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-6)
    losses = torch.empty(3)
    rows.copy_(plain)
    in_place.write_losses_and_gradients(rows, labels, LossTerms(-100, 0.1, 0.2), losses)
    wide = plain.double().requires_grad_()
    total = reference.cross_entropy(wide, labels, z_loss=0.1, smoothing=0.2)[0]
    torch.testing.assert_close(rows.double(), torch.autograd.grad(total, wide)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.double().sum(), total.detach(), rtol=1e-6, atol=0.0)
    rows.fill_(7.0)
    assert torch.equal(memory, torch.full_like(memory, 7.0))


def test_float64_and_mixed_dtypes_stay_with_the_reference() -> None:
    hidden, weight, labels = normal(2, 4), normal(5, 4), torch.tensor([1, 2])
    assert cross_entropy(hidden.double(), labels)[0].dtype == torch.float64
    with pytest.raises(RuntimeError, match="same dtype"):
        linear_cross_entropy(hidden, weight.half(), labels)


def test_every_run_gives_the_same_bits() -> None:
    hidden, weight, labels = normal(6, 4), normal(11, 4), torch.arange(6)

    def run() -> list[Tensor]:
        inputs = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        total = (
            linear_cross_entropy(inputs[0], inputs[1], labels, budget_bytes=100)
            + cross_entropy(inputs[0] @ weight.t(), labels)[0]
        )
        return [total.detach(), *torch.autograd.grad(total, inputs)]

    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(run(), first, strict=True))


def test_torch_knows_the_operators() -> None:
    kernels: Any = torch.ops.colossal_kernels
    logits, labels, lse = normal(3, 7).requires_grad_(), torch.tensor([1, 2, -100]), torch.ones(3)
    check = torch.library.opcheck
    check(kernels.cross_entropy.default, (logits, labels, -100, 0.1, 0.2, False), test_utils=UNDER_THE_INTERPRETER)
    numbers = (2, 9, 12, -100, 0.1, 0.2)
    plain = logits.detach()
    check(kernels.vocabulary_statistics.default, (plain, labels, *numbers), test_utils=UNDER_THE_INTERPRETER)
    given = (torch.ones(()), plain, labels, lse, *numbers)
    check(kernels.vocabulary_gradient.default, given, test_utils=UNDER_THE_INTERPRETER)
    check(kernels.vocabulary_gradient_.default, given, test_utils=UNDER_THE_INTERPRETER)
    check(kernels.scale_.default, (plain.clone(), torch.ones(1)), test_utils=UNDER_THE_INTERPRETER)
    hidden, weight, bias = normal(3, 4).requires_grad_(), normal(7, 4).requires_grad_(), normal(7).requires_grad_()
    arguments = (hidden, weight, bias, labels, [True, True, True], 40, -100, 0.1, 0.2)
    check(kernels.linear_cross_entropy.default, arguments, test_utils=("test_schema", "test_faketensor"))
