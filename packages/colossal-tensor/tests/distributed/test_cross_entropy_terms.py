"""Cross-entropy of cut logits with z-loss and smoothing, and by the op table's implementations, against core's op on whole logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from colossal_comm import run_simulated
from colossal_core.collectives import Collectives
from colossal_core.mesh import MeshLayout
from colossal_core.ops import OpTable, build_op_table
from colossal_core.ops.reference import cross_entropy, reference_ops
from colossal_tensor.cross_entropy import Words, vocabulary_cross_entropy

MESH = MeshLayout((1, 1, 1, 1, 2))
WORDS = (Words(0, 7, 11), Words(7, 11, 11))
TERMS: dict[str, Any] = {"z_loss": 0.05, "smoothing": 0.1}


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(2, 4, 11, generator=generator, dtype=torch.float64)
    return logits, torch.tensor([[0, 10, -100, 6], [7, -100, 3, 3]])


def on_rank(collectives: Collectives, terms: dict[str, Any], mode: str, ops: OpTable | None) -> Any:
    logits, labels = example()
    words = WORDS[collectives.index("tp")]
    own = torch.nn.functional.pad(logits[..., words.start : words.stop], (0, 2), value=1e6).requires_grad_()
    loss = vocabulary_cross_entropy(collectives, "tp", words, ops)
    if mode == "compiled":
        loss = loss.compiled("eager", dynamic=False)
    total, items = loss(own, labels, overwrite=mode == "overwrite", **terms)
    (gradient,) = torch.autograd.grad(0.7 * total, own)
    ledger: Any = getattr(collectives, "ledger")  # noqa: B009 - of comm's collectives, not of the protocol
    return total.detach(), items, gradient, [row.sent_bytes for row in ledger.rows()]


def check(found: list[Any], terms: dict[str, Any]) -> None:
    logits, labels = example()
    expected, items = cross_entropy(logits.requires_grad_(), labels, **terms)
    (whole,) = torch.autograd.grad(0.7 * expected, logits)
    for words, (total, own_items, gradient, _) in zip(WORDS, found, strict=True):
        assert abs(float(total - expected.detach())) <= 1e-12 * float(expected.detach())
        assert own_items == items
        assert (gradient[..., : words.size] - whole[..., words.start : words.stop]).norm() <= 1e-12 * whole.norm()
        assert not gradient[..., words.size :].any()


@pytest.mark.parametrize("mode", ["eager", "overwrite"])
@pytest.mark.parametrize("name", ["z_loss", "smoothing", "both"])
def test_terms_are_those_of_whole_logits(name: str, mode: str) -> None:
    terms = TERMS if name == "both" else {name: TERMS[name]}
    found = run_simulated(MESH, lambda ranks: on_rank(ranks, terms, mode, None))
    check(found, terms)
    assert [sent for *_, sent in found] == [[(3 + ("smoothing" in terms)) * 8 * 8]] * 2


def test_terms_of_compiled_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to the compiler, as it is: simulated ranks are threads, in which it does not run."""

    def uncompiled(function: Callable[..., Any], *, backend: str, dynamic: bool) -> Callable[..., Any]:
        assert (backend, dynamic) == ("eager", False)
        return function

    monkeypatch.setattr(torch, "compile", uncompiled)
    check(run_simulated(MESH, lambda ranks: on_rank(ranks, TERMS, "compiled", None)), TERMS)


def kernels(calls: list[str]) -> OpTable:
    """A table in which the three ops of the loss are somebody's kernels, which say when they are called."""

    def telling(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **keywords: Any) -> Any:
            calls.append(op)
            return function(*arguments, **keywords)

        return called

    names = ("cross_entropy", "vocabulary_statistics", "vocabulary_gradient")
    announced = [
        replace(found, provider="fast", priority=1, function=telling(found.op, found.function))
        for found in reference_ops()
        if found.op in names
    ]
    return build_op_table([*reference_ops(), *announced], "cpu", "float64")


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_the_op_table_s_kernels_serve_compiled_or_not(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def uncompiled(function: Callable[..., Any], *, backend: str, dynamic: bool) -> Callable[..., Any]:
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", uncompiled)
    calls: list[str] = []
    ops = kernels(calls)
    check(run_simulated(MESH, lambda ranks: on_rank(ranks, TERMS, mode, ops)), TERMS)
    assert sorted(calls) == ["vocabulary_gradient"] * 2 + ["vocabulary_statistics"] * 2
    assert sorted(set(compiled)) == (["rescaled", "row_losses"] if mode == "compiled" else [])


def test_references_of_the_op_table_serve_in_chunks() -> None:
    ops = build_op_table(reference_ops(), "cpu", "float64")
    check(run_simulated(MESH, lambda ranks: on_rank(ranks, TERMS, "eager", ops)), TERMS)
