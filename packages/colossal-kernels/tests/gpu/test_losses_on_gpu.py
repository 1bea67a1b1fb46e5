"""Losses over vocabularies as large as those of models, in bfloat16, against float64: at most twice the reference's error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from colossal_core.ops import reference
from colossal_kernels.losses import linear_cross_entropy as linear_module
from colossal_kernels.losses.cross_entropy import cross_entropy
from colossal_kernels.losses.linear_cross_entropy import Chunks, linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TERMS: dict[str, Any] = {"z_loss": 1e-4, "smoothing": 0.1}


def normal(*shape: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(5)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64).bfloat16()


def labels_of(rows: int, vocabulary: int) -> Tensor:
    """The first and the last word, and an ignored row."""
    found = torch.arange(rows, device="cuda") * 997 % vocabulary
    found[:3] = torch.tensor([0, -100, vocabulary - 1], device="cuda")
    return found


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves), leaves, torch.full((), 0.75, device="cuda", dtype=torch.float32))


def assert_as_exact(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert float((ours.double() - truth).norm()) <= 2.0 * float((theirs.double() - truth).norm())


@pytest.mark.parametrize("vocabulary", [50257, 50264, 128256], ids=["any length", "eights", "sixteens"])
@pytest.mark.parametrize("rows", [5, 600], ids=["several programs a row", "one program a row"])
def test_rows_of_any_length(vocabulary: int, rows: int) -> None:
    logits, labels = normal(rows, vocabulary), labels_of(rows, vocabulary)
    (truth,) = gradients(lambda x: reference.cross_entropy(x, labels, **TERMS)[0].float(), logits.double())
    (theirs,) = gradients(lambda x: reference.cross_entropy(x, labels, **TERMS)[0], logits)
    for overwrite in (False, True):
        found = logits.clone()
        (ours,) = gradients(lambda x, over=overwrite: cross_entropy(x, labels, overwrite=over, **TERMS)[0], found)
        assert_as_exact(ours, theirs, truth)
        assert not ours[1].any()


@pytest.mark.parametrize("vocabulary", [50257, 50304, 128256], ids=["any length", "short rows", "long rows"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_chunks_and_parts(vocabulary: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if vocabulary % (8 * parts):
        parts = 1
    monkeypatch.setattr(linear_module, "chunks_of", lambda *_: Chunks(128, parts))
    hidden, weight, labels = normal(320, 256), normal(vocabulary, 256) / 16.0, labels_of(320, vocabulary)
    truth = gradients(
        lambda x, w: reference.linear_cross_entropy(x, w, labels, **TERMS).float(), hidden.double(), weight.double()
    )
    theirs = gradients(lambda x, w: reference.linear_cross_entropy(x, w, labels, **TERMS), hidden, weight)
    ours = gradients(lambda x, w: linear_cross_entropy(x, w, labels, **TERMS), hidden, weight)
    for found, other, exact in zip(ours, theirs, truth, strict=True):
        assert_as_exact(found, other, exact)
