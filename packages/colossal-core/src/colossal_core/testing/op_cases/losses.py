"""Losses over a vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from colossal_core.testing.op_cases.case import Cases, Normal, OpCase


def _labels(generator: torch.Generator, size: int, vocabulary: int) -> torch.Tensor:
    labels = torch.randint(vocabulary, (size,), generator=generator)
    return labels.masked_fill(torch.arange(size) % 3 == 1, -100)


def _cross_entropy(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    yield OpCase("rows", (normal(7, 11), _labels(generator, 7, 11)))
    yield OpCase("sequences", (normal(2, 5, 13), _labels(generator, 10, 13).view(2, 5)))
    yield OpCase("nothing counts", (normal(3, 5), torch.full((3,), -100)))
    yield OpCase("empty", (normal(0, 5), torch.zeros(0, dtype=torch.long)))
    yield OpCase("logits stay", (normal(4, 9), _labels(generator, 4, 9)), {"overwrite": False})


def _linear_cross_entropy(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    yield OpCase("chunks", (normal(7, 6), normal(11, 6), _labels(generator, 7, 11)), {"chunk": 3})
    yield OpCase("bias", (normal(2, 4, 6), normal(9, 6), _labels(generator, 8, 9).view(2, 4), normal(9)))
    yield OpCase("nothing counts", (normal(3, 6), normal(5, 6), torch.full((3,), -100)))


CASES: Mapping[str, Cases] = {"cross_entropy": _cross_entropy, "linear_cross_entropy": _linear_cross_entropy}
