"""Reference cross-entropy over a vocabulary. Legend: N rows (all leading dimensions flattened), V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from colossal_core.ops.norms import statistics_dtype

# Rows are taken in chunks of this many logits, so that the float32 copies of bfloat16 logits stay at 64 MiB each.
CHUNK_LOGITS = 1 << 24


@dataclass(frozen=True)
class LossTerms:
    """What the loss of a row is made of.

    ignore_index: rows with this label do not count. z_loss: factor of logsumexp^2, which keeps logits from drifting (Chowdhery et al.
    2022, section 5: 1e-4). smoothing: share of the target that is spread evenly over all words, the label's included (Szegedy et al. 2016,
    section 7), as `torch.nn.functional.cross_entropy`'s `label_smoothing`.
    """

    ignore_index: int = -100
    z_loss: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        assert self.z_loss >= 0.0 and 0.0 <= self.smoothing <= 1.0, f"{self}"


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = -100,
    *,
    overwrite: bool = False,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the rows' losses, and the number of rows that count.

        lse = logsumexp(logits)
        loss = lse - (1 - smoothing) logits[label] - smoothing mean(logits) + z_loss lse^2
        d loss / d logits = (1 + 2 z_loss lse) softmax(logits) - (1 - smoothing) onehot(label) - smoothing / V

    logits: [..., V]; labels: [...] integers, already shifted; rows whose label is `ignore_index` add nothing and get a
    zero gradient. z_loss, smoothing: see `LossTerms`. Returns the sum, 0-d in float32 (float64 for float64 logits),
    zero when no row counts, and the count, 0-d int64. The gradient is recomputed from the logits and one float32
    number a row: between forward and backward nothing else is kept, and the only tensor of the logits' size that is
    made is their gradient, in their own dtype. overwrite: not even that, the gradient is written over the logits; for a
    caller that knows that nobody reads them after the backward pass (autograd itself says so when it needs them again).
    """
    assert logits.shape[:-1] == labels.shape, f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}"
    rows = logits.reshape(-1, logits.shape[-1])
    total: torch.Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, labels.reshape(-1), LossTerms(ignore_index, z_loss, smoothing), overwrite
    )
    return total, (labels != ignore_index).sum()


def rows_per_chunk(num_columns: int) -> int:
    return max(1, CHUNK_LOGITS // max(1, num_columns))


def row_losses(logits: torch.Tensor, labels: torch.Tensor, terms: LossTerms) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [N] (zero where ignored) and logsumexp [N] of logits [N, V], both in the statistic's dtype."""
    wide = logits.to(statistics_dtype(logits.dtype))
    lse = torch.logsumexp(wide, dim=-1)
    counted = labels != terms.ignore_index
    chosen = wide.gather(1, labels.where(counted, 0).unsqueeze(1)).squeeze(1)
    mean = wide.mean(1) if terms.smoothing else None
    return joined_losses(lse, chosen, mean, terms).where(counted, 0.0), lse


def joined_losses(lse: torch.Tensor, chosen: torch.Tensor, mean: torch.Tensor | None, terms: LossTerms) -> torch.Tensor:
    """Losses [N] from a row's logsumexp, its label's logit and, where there is smoothing, the mean of its logits."""
    losses = lse - chosen
    if mean is not None:
        losses = losses + terms.smoothing * (chosen - mean)
    return losses + terms.z_loss * lse.square() if terms.z_loss else losses


def row_gradients(logits: torch.Tensor, lse: torch.Tensor, labels: torch.Tensor, terms: LossTerms) -> torch.Tensor:
    """d(sum of losses) / d(logits): [N, V] in the statistic's dtype, zero in ignored rows even where the logits are
    not finite.
    """
    counted = labels != terms.ignore_index
    gradient = (logits.to(lse.dtype) - lse.unsqueeze(1)).exp_()
    if terms.z_loss:
        gradient.mul_((1.0 + 2.0 * terms.z_loss * lse).unsqueeze(1))
    if terms.smoothing:
        gradient.sub_(terms.smoothing / logits.shape[1])
    of_label = torch.full((len(labels), 1), terms.smoothing - 1.0, dtype=lse.dtype, device=lse.device)
    gradient.scatter_add_(1, labels.where(counted, 0).unsqueeze(1), of_label)
    return gradient.masked_fill_(~counted.unsqueeze(1), 0.0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, terms: LossTerms, overwrite: bool
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=statistics_dtype(logits.dtype), device=logits.device)
        lse = torch.empty(len(labels), dtype=total.dtype, device=logits.device)
        step = rows_per_chunk(logits.shape[1])
        for start in range(0, len(labels), step):
            rows = slice(start, start + step)
            losses, lse[rows] = row_losses(logits[rows], labels[rows], terms)
            total += losses.sum()
        ctx.save_for_backward(logits, labels, lse)
        ctx.terms, ctx.overwrite = terms, overwrite
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, labels, lse = ctx.saved_tensors
        logits = logits.detach()
        gradient = logits if ctx.overwrite else torch.empty_like(logits)
        step = rows_per_chunk(logits.shape[1])
        for start in range(0, len(labels), step):
            rows = slice(start, start + step)
            chunk = row_gradients(logits[rows], lse[rows], labels[rows], ctx.terms)
            gradient[rows] = chunk.mul_(grad_total)
        return gradient, None, None, None
