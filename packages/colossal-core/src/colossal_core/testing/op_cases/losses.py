"""Losses over a vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from colossal_core.ops.cross_entropy import LossTerms
from colossal_core.ops.vocabulary import Words
from colossal_core.testing.op_cases.case import Cases, Normal, OpCase

TERMS = {"z_loss": 0.1, "smoothing": 0.2}


def _labels(generator: torch.Generator, size: int, vocabulary: int) -> torch.Tensor:
    labels = torch.randint(vocabulary, (size,), generator=generator)
    return labels.masked_fill(torch.arange(size) % 3 == 1, -100)


def _cross_entropy(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    yield OpCase("rows", (normal(7, 11), _labels(generator, 7, 11)))
    yield OpCase("sequences", (normal(2, 5, 13), _labels(generator, 10, 13).view(2, 5)))
    yield OpCase("nothing counts", (normal(3, 5), torch.full((3,), -100)))
    yield OpCase("empty", (normal(0, 5), torch.zeros(0, dtype=torch.long)))
    yield OpCase("logits stay", (normal(4, 9), _labels(generator, 4, 9)), {"overwrite": False})
    yield OpCase("one word", (normal(3, 1), torch.zeros(3, dtype=torch.long)))
    yield OpCase("all terms", (normal(5, 17), _labels(generator, 5, 17)), TERMS)
    yield OpCase("z-loss, another label ignored", (normal(5, 6), torch.tensor([0, 1, 2, 3, 4]), 2), {"z_loss": 0.01})
    yield OpCase("smoothing", (normal(2, 3, 8), _labels(generator, 6, 8).view(2, 3)), {"smoothing": 0.1})
    yield OpCase("columns apart", (normal(6, 5).transpose(0, 1), _labels(generator, 5, 6)))
    yield OpCase("rows apart", (normal(5, 12)[:, 1:8], _labels(generator, 5, 7)))
    yield OpCase("few long rows", (normal(2, 4099), _labels(generator, 2, 4099)), TERMS)


def _vocabulary_statistics(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    labels = _labels(generator, 7, 20)
    yield OpCase("words in the middle", (normal(7, 8), labels, Words(5, 13, 20), LossTerms()))
    yield OpCase("padding", (normal(7, 9), labels, Words(13, 20, 20), LossTerms(smoothing=0.1)))
    yield OpCase("nothing counts", (normal(3, 5), torch.full((3,), -100), Words(0, 5, 20), LossTerms()))
    yield OpCase("empty", (normal(0, 5), torch.zeros(0, dtype=torch.long), Words(0, 5, 20), LossTerms()))
    yield OpCase("few long rows", (normal(2, 4099), _labels(generator, 2, 4096), Words(0, 4096, 9000), LossTerms()))


def _vocabulary_gradient(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    def lse(rows: int) -> torch.Tensor:
        wide = 3.0 + normal(rows)
        return wide if wide.dtype == torch.float64 else wide.float()

    labels, scale = _labels(generator, 7, 20), torch.full((), 0.7, dtype=lse(1).dtype)
    yield OpCase("words in the middle", (scale, normal(7, 8), labels, lse(7), Words(5, 13, 20), LossTerms()))
    terms = LossTerms(-100, **TERMS)
    yield OpCase("padding and all terms", (scale, normal(7, 9), labels, lse(7), Words(13, 20, 20), terms))
    nothing = torch.full((3,), -100)
    yield OpCase("nothing counts", (scale, normal(3, 5), nothing, lse(3), Words(0, 5, 20), terms))
    none = torch.zeros(0, dtype=torch.long)
    yield OpCase("empty", (scale, normal(0, 5), none, lse(0), Words(0, 5, 20), LossTerms()))


def _linear_cross_entropy(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    yield OpCase("chunks", (normal(7, 6), normal(11, 6), _labels(generator, 7, 11)), {"budget_bytes": 70})
    yield OpCase("bias", (normal(2, 4, 6), normal(9, 6), _labels(generator, 8, 9).view(2, 4), normal(9)))
    yield OpCase("nothing counts", (normal(3, 6), normal(5, 6), torch.full((3,), -100)))
    yield OpCase("no rows", (normal(0, 6), normal(5, 6), torch.zeros(0, dtype=torch.long)))
    all_terms = {"budget_bytes": 1, **TERMS}
    yield OpCase("a row at a time", (normal(5, 3), normal(7, 3), _labels(generator, 5, 7), normal(7)), all_terms)
    yield OpCase("rows apart", (normal(5, 8)[:, 1:7], normal(9, 6), _labels(generator, 5, 9)))


CASES: Mapping[str, Cases] = {
    "cross_entropy": _cross_entropy,
    "vocabulary_statistics": _vocabulary_statistics,
    "vocabulary_gradient": _vocabulary_gradient,
    "linear_cross_entropy": _linear_cross_entropy,
}
