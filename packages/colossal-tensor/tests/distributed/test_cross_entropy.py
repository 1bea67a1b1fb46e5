"""Cross-entropy of cut logits against core's op on whole ones, in float64: sums, counts, gradients, bytes, and what is not finite."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from colossal_comm import run_simulated
from colossal_core.collectives import Collectives, SingleProcess
from colossal_core.mesh import MeshLayout
from colossal_core.ops.cross_entropy import cross_entropy
from colossal_core.testing import WorkerPool
from colossal_tensor.cross_entropy import VocabularyCrossEntropy, Words, vocabulary_cross_entropy

PADDING = 6.0e4
"""What stands in padded columns: larger than any logit, so that it would show."""


@dataclass(frozen=True)
class Cut:
    """sizes: words of each rank; padding: further columns of each."""

    sizes: tuple[int, ...]
    padding: tuple[int, ...]

    def words(self, rank: int) -> Words:
        start = sum(self.sizes[:rank])
        return Words(start, start + self.sizes[rank], sum(self.sizes))

    @property
    def mesh(self) -> MeshLayout:
        return MeshLayout((1, 1, 1, 1, len(self.sizes)))


EVEN = Cut((6, 6), (0, 0))
CUTS = [
    EVEN,
    Cut((7, 6), (0, 1)),
    Cut((4, 4, 3), (0, 0, 1)),
    Cut((4, 5, 0), (1, 0, 3)),
    Cut((3, 3, 3, 2), (2, 2, 2, 3)),
]
WEIGHT = 0.7
"""The gradient that arrives at the sum."""


def example(num_words: int, ignored: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_words)
    logits = 4 * torch.randn(2, 5, num_words, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, num_words, (2, 5), generator=generator)
    labels[0] = torch.tensor([0, num_words - 1, 0, num_words - 1, num_words // 2])
    if ignored == "some":
        labels[:, 1::2] = -100
    if ignored == "all":
        labels.fill_(-100)
    return logits, labels


def local_logits(logits: torch.Tensor, cut: Cut, rank: int) -> torch.Tensor:
    words = cut.words(rank)
    own = logits.new_full((*logits.shape[:-1], words.size + cut.padding[rank]), PADDING)
    own[..., : words.size] = logits[..., words.start : words.stop]
    return own


def loss_of(collectives: Collectives, cut: Cut, mode: str) -> Any:
    loss = vocabulary_cross_entropy(collectives, "tp", cut.words(collectives.index("tp")))
    if mode.startswith("compiled"):
        loss = loss.compiled("aot_eager", dynamic=mode.endswith("dynamic"))
    if mode.endswith("overwrite"):
        return partial(loss, overwrite=True)
    if mode.startswith("inside"):
        dynamic = mode.endswith("dynamic")

        def inside(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            total, items = loss(logits * 1.0, labels)
            return total * 1.0, items

        return torch.compile(inside, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    return loss


def on_rank(
    collectives: Collectives, cut: Cut, logits: torch.Tensor, labels: torch.Tensor, mode: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    own = local_logits(logits, cut, collectives.index("tp")).requires_grad_()
    total, items = loss_of(collectives, cut, mode)(own, labels)
    torch.autograd.backward(total, torch.tensor(WEIGHT, dtype=total.dtype))
    assert own.grad is not None
    return total.detach(), items, own.grad


def check(cut: Cut, logits: torch.Tensor, labels: torch.Tensor, found: list[Any]) -> None:
    whole = logits.clone().requires_grad_()
    total, items = cross_entropy(whole, labels)
    torch.autograd.backward(total, torch.tensor(WEIGHT, dtype=total.dtype))
    assert whole.grad is not None
    for rank, (own_total, own_items, gradient) in enumerate(found):
        words = cut.words(rank)
        expected = whole.grad[..., words.start : words.stop]
        assert own_total.dtype == total.dtype and (own_total - total).abs() <= 1e-12 * total.abs()
        assert own_items.dtype == items.dtype and own_items == items
        assert (gradient[..., : words.size] - expected).norm() <= 1e-12 * max(whole.grad.norm().item(), 1e-300)
        assert gradient[..., words.size :].eq(0).all()


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("mode", ["eager", "overwrite"])
def test_exact_on_simulated_ranks(cut: Cut, ignored: str, mode: str) -> None:
    logits, labels = example(sum(cut.sizes), ignored)
    check(cut, logits, labels, run_simulated(cut.mesh, lambda ranks: on_rank(ranks, cut, logits, labels, mode)))


def every_mode(collectives: Collectives, which: int, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    cut = CUTS[which]
    collectives = collectives.with_mesh(cut.mesh)
    modes = ("eager", "overwrite", "compiled", "compiled dynamic", "compiled overwrite", "inside", "inside dynamic")
    return {mode: on_rank(collectives, cut, logits, labels, mode) for mode in modes}


def test_exact_on_gloo_eager_and_compiled(pool: WorkerPool) -> None:
    cut = CUTS[1]
    logits, labels = example(sum(cut.sizes), "some")
    ranks = pool.run(2, every_mode, 1, logits, labels)
    for mode in ranks[0]:
        check(cut, logits, labels, [rank[mode] for rank in ranks])


# Dynamo itself makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("mode", ["eager", "compiled", "inside"])
def test_one_process_is_cores_op(mode: str) -> None:
    cut = Cut((9,), (3,))
    logits, labels = example(9, "some")
    check(cut, logits, labels, [on_rank(SingleProcess(torch.device("cpu")), cut, logits, labels, mode)])


def test_many_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colossal_core.ops.cross_entropy.CHUNK_LOGITS", 20)
    logits, labels = example(12, "some")
    check(EVEN, logits, labels, run_simulated(EVEN.mesh, lambda ranks: on_rank(ranks, EVEN, logits, labels, "eager")))


def test_no_rows() -> None:
    logits, labels = torch.zeros(0, 12, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    check(EVEN, logits, labels, run_simulated(EVEN.mesh, lambda ranks: on_rank(ranks, EVEN, logits, labels, "eager")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_have_wide_sums_and_gradients_of_their_own_dtype(dtype: torch.dtype) -> None:
    logits, labels = example(12, "some")
    logits = logits.to(dtype)
    whole = logits.clone().requires_grad_()
    expected, _ = cross_entropy(whole, labels)
    for total, _, gradient in run_simulated(EVEN.mesh, lambda ranks: on_rank(ranks, EVEN, logits, labels, "eager")):
        assert total.dtype == expected.dtype == torch.float32
        assert (total - expected).abs() <= 4 * torch.finfo(torch.float32).eps * expected
        assert gradient.dtype == dtype


def extreme_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """What rows of logits may hold besides ordinary numbers, and labels [rows] of words of both ranks."""
    inf, nan = math.inf, math.nan
    rows = [
        [-inf] * 6 + [1.0, 2.0, 3.0, -inf, 0.0, 0.0],  # a rank without any word
        [-inf] * 6 + [-1000.0, -1001.0] + [-inf] * 4,  # and the other's far below zero
        [1000.0, 999.0] + [-inf] * 10,
        [-inf] * 12,
        [1.0] * 5 + [inf] + [2.0] * 6,
        [1.0] * 11 + [nan],
        [1.0e4] * 6 + [-1.0e4] * 6,
    ]
    return torch.tensor(rows, dtype=torch.float64), torch.tensor([7, 6, 0, 3, 8, 2, 11])


@pytest.mark.parametrize("row", range(7))
def test_infinities_and_nan_are_those_of_whole_logits(row: int) -> None:
    rows, labels = extreme_rows()
    logits, label = rows[row : row + 1], labels[row : row + 1]
    whole = logits.clone().requires_grad_()
    total, _ = cross_entropy(whole, label)
    torch.autograd.backward(total)
    assert whole.grad is not None
    found = run_simulated(EVEN.mesh, lambda ranks: on_rank(ranks, EVEN, logits, label, "eager"))
    for own_total, _, _ in found:
        torch.testing.assert_close(own_total, total.detach(), rtol=1e-12, atol=0, equal_nan=True)
    joined = torch.cat([gradient for _, _, gradient in found], dim=1)
    torch.testing.assert_close(joined, WEIGHT * whole.grad, rtol=1e-12, atol=1e-300, equal_nan=True)


def test_ignored_rows_that_are_not_finite_add_nothing() -> None:
    logits, _ = extreme_rows()
    labels = torch.full((len(logits),), -100)
    for total, items, gradient in run_simulated(EVEN.mesh, lambda ranks: on_rank(ranks, EVEN, logits, labels, "eager")):
        assert (total.item(), items.item(), gradient.abs().sum().item()) == (0.0, 0, 0.0)


def test_a_label_that_is_no_word_is_no_silent_zero() -> None:
    logits, labels = example(11, "none")
    labels[1, 2] = 11
    cut = Cut((6, 5), (0, 1))
    for total, _, _ in run_simulated(cut.mesh, lambda ranks: on_rank(ranks, cut, logits, labels, "eager")):
        assert math.isnan(total.item())


def counted(collectives: Collectives) -> list[tuple[str, str, int, int]]:
    logits, labels = example(12, "some")
    loss = vocabulary_cross_entropy(collectives, "tp", EVEN.words(collectives.index("tp")))
    own = local_logits(logits, EVEN, collectives.index("tp")).float().requires_grad_()
    torch.autograd.backward(loss(own, labels)[0])
    ledger: Any = getattr(collectives, "ledger")  # noqa: B009 - of comm's collectives, not of the protocol
    return [(row.operation, row.tag, row.num_calls, row.sent_bytes) for row in ledger.rows()]


def test_bytes_are_three_numbers_a_row() -> None:
    expected = [("all_reduce", "loss", 2, 3 * 4 * 10)]
    assert run_simulated(EVEN.mesh, counted) == [expected, expected]


def second_backward(collectives: Collectives, overwrite: bool) -> str:
    logits, labels = example(12, "some")
    own = local_logits(logits, EVEN, collectives.index("tp")).requires_grad_()
    words = EVEN.words(collectives.index("tp"))
    total, _ = vocabulary_cross_entropy(collectives, "tp", words)(own, labels, overwrite=overwrite)
    torch.autograd.backward(total, retain_graph=True)
    try:
        torch.autograd.backward(total)
    except RuntimeError as error:
        return str(error).partition(":")[0]
    return ""


def test_logits_that_are_overwritten_cannot_be_used_twice() -> None:
    message = "one of the variables needed for gradient computation has been modified by an inplace operation"
    assert run_simulated(EVEN.mesh, lambda ranks: second_backward(ranks, False)) == ["", ""]
    assert run_simulated(EVEN.mesh, lambda ranks: second_backward(ranks, True)) == [message, message]


def test_a_copy_keeps_its_ranks() -> None:
    loss: VocabularyCrossEntropy = vocabulary_cross_entropy(SingleProcess(torch.device("cpu")), "tp", Words(0, 4, 4))
    assert copy.deepcopy(loss) is loss
