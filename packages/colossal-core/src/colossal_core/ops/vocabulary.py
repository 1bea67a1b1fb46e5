"""Reference parts of the cross-entropy of logits that are cut by words: what a rank computes of its own columns, before and after it has
talked to the others (Shoeybi et al. 2019, section 3). No collective here. Legend: N rows, C columns of a rank, of which the first are its
words and the rest padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from colossal_core.ops.cross_entropy import LossTerms, rows_per_chunk
from colossal_core.ops.norms import statistics_dtype


@dataclass(frozen=True)
class Words:
    """The words of one rank: [start, stop) of `total`; its logits may have more columns, which are padding and never count."""

    start: int
    stop: int
    total: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def vocabulary_statistics(logits: torch.Tensor, labels: torch.Tensor, words: Words, terms: LossTerms) -> torch.Tensor:
    """Of each row: the largest logit m of this rank's words, the sum of exp(logits - m), the label's logit where the word is this rank's,
    else 0, and with `terms.smoothing` the sum of the logits.

    logits: [N, C]; labels: [N] words of the whole vocabulary. Returns [3, N], with smoothing [4, N], in float32 (float64 for float64
    logits), one statistic after the other, so that they are sent as they are. An infinite m is left out of the exponent. Rows that do not
    count are zeros; without words a row is -inf, then zeros. Not differentiable: `vocabulary_gradient` is the gradient.
    """
    step = rows_per_chunk(logits.shape[1])
    chunks = zip(torch.split(logits, step), torch.split(labels, step), strict=True)
    return torch.cat([row_statistics(part, of_part, words, terms) for part, of_part in chunks], dim=1)


def vocabulary_gradient(
    scale: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    words: Words,
    terms: LossTerms,
    *,
    overwrite: bool = False,
) -> torch.Tensor:
    """d(scale x sum of losses) / d(logits): [N, C] in the logits' dtype, zero in padding, and in ignored rows even where the logits are not
    finite. The loss is `cross_entropy`'s, over the whole vocabulary.

    scale: 0-d, the gradient that arrives at the sum. lse: [N], logsumexp of each row over all ranks, in the dtype of
    `vocabulary_statistics`. overwrite: written over the logits, which are what is returned. Not differentiable.
    """
    found = logits.detach() if overwrite else torch.empty_like(logits)
    step = rows_per_chunk(logits.shape[1])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        found[rows] = row_gradients(scale, logits[rows], labels[rows], lse[rows], words, terms)
    return found


@torch.no_grad()
def row_statistics(logits: torch.Tensor, labels: torch.Tensor, words: Words, terms: LossTerms) -> torch.Tensor:
    """`vocabulary_statistics` of rows that are few enough to be taken at once; for torch.compile, of all."""
    wide = logits[:, : words.size].to(statistics_dtype(logits.dtype))
    counted = labels != terms.ignore_index
    if words.size == 0:
        none = torch.zeros(len(labels), dtype=wide.dtype, device=wide.device)
        rows = [(none - math.inf).where(counted, 0.0), none, none]
        return torch.stack([*rows, none] if terms.smoothing else rows)
    largest = wide.amax(dim=1)
    exponentials = (wide - shift(largest).unsqueeze(1)).exp().sum(dim=1)
    own = (labels >= words.start) & (labels < words.stop) & counted
    places = (labels - words.start).where(own, 0).unsqueeze(1)
    chosen = logits.gather(1, places).squeeze(1).to(wide.dtype).where(own, 0.0)
    rows = [largest, exponentials, chosen]
    return torch.stack([*rows, wide.sum(1)] if terms.smoothing else rows).where(counted, 0.0)


def shift(largest: torch.Tensor) -> torch.Tensor:
    """What is taken off before exponentials: an infinity stays in, or it would become inf - inf."""
    return largest.where(largest.abs() != math.inf, 0.0)


@torch.no_grad()
def row_gradients(
    scale: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    words: Words,
    terms: LossTerms,
) -> torch.Tensor:
    """`vocabulary_gradient` of rows that are few enough to be taken at once; for torch.compile, of all."""
    softmax = (logits.to(lse.dtype) - lse.unsqueeze(1)).exp()
    if terms.z_loss:
        softmax = softmax * (1.0 + 2.0 * terms.z_loss * lse).unsqueeze(1)
    if terms.smoothing:
        softmax = softmax - terms.smoothing / words.total
    columns = torch.arange(logits.shape[1], device=logits.device)
    of_label = columns == (labels - words.start).unsqueeze(1)
    of_rows = torch.where(of_label, softmax - (1.0 - terms.smoothing), softmax) * scale
    counted = (labels != terms.ignore_index).unsqueeze(1) & (columns < words.size)
    return of_rows.where(counted, 0.0).to(logits.dtype)
