"""Cross-entropy of which both passes are compiled: what the reference does in chunks becomes one read of the logits forward, and one read
and one write backward. Legend: N rows (all leading dimensions flattened), V vocabulary.

The passes are compiled apart, inside an autograd function of our own, so that what is kept between them is decided here and by no
partitioner: the logits and one number a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from colossal_core.ops.cross_entropy import LossTerms, joined_losses
from colossal_core.ops.norms import statistics_dtype

CrossEntropy = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class _Passes:
    """`forward_pass`, `backward_pass` and `overwriting_pass`, compiled."""

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    backward: Callable[..., torch.Tensor]
    overwrite: Callable[..., None]


def compiled_cross_entropy(backend: str, *, dynamic: bool) -> CrossEntropy:
    """The op `cross_entropy` (signature, meaning and dtypes of the reference) compiled by torch.compile with `backend`, on first use.

    Between forward and backward it keeps the logits as they are and one float32 a row (float64 for float64 logits); with inductor no
    tensor of the logits' size is made but their gradient, in their own dtype, and not even that with `overwrite`.
    dynamic: compiled for changing sizes; False: another number of rows compiles again.
    """
    passes = _Passes(
        torch.compile(forward_pass, backend=backend, dynamic=dynamic),
        torch.compile(backward_pass, backend=backend, dynamic=dynamic),
        torch.compile(overwriting_pass, backend=backend, dynamic=dynamic),
    )

    def cross_entropy(
        logits: torch.Tensor,
        labels: torch.Tensor,
        ignore_index: int = -100,
        *,
        overwrite: bool = False,
        z_loss: float = 0.0,
        smoothing: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert logits.shape[:-1] == labels.shape, f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
        rows = logits.reshape(-1, logits.shape[-1])
        terms = LossTerms(ignore_index, z_loss, smoothing)
        found: tuple[torch.Tensor, torch.Tensor] = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
            rows, labels.reshape(-1), terms, passes, overwrite
        )
        return found

    return cross_entropy


def forward_pass(
    logits: torch.Tensor, labels: torch.Tensor, terms: LossTerms
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of losses 0-d, number of rows that count 0-d int64, and logsumexp [N], of logits [N, V] and labels [N].

    Written as the largest logit and the sum of exponentials, in which inductor sees one pass over the row.
    """
    wide = logits.to(statistics_dtype(logits.dtype))
    largest = wide.amax(dim=1, keepdim=True)
    lse = (largest + (wide - largest).exp().sum(dim=1, keepdim=True).log()).squeeze(1)
    counted = labels != terms.ignore_index
    chosen = logits.gather(1, labels.where(counted, 0).unsqueeze(1)).squeeze(1).to(lse.dtype)
    mean = wide.mean(1) if terms.smoothing else None
    return joined_losses(lse, chosen, mean, terms).where(counted, 0.0).sum(), counted.sum(), lse


def backward_pass(
    gradient: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, terms: LossTerms
) -> torch.Tensor:
    """d(gradient x sum of losses) / d(logits): [N, V] in the logits' dtype, zero in ignored rows even where they are not finite."""
    softmax = (logits.to(lse.dtype) - lse.unsqueeze(1)).exp()
    if terms.z_loss:
        softmax = softmax * (1.0 + 2.0 * terms.z_loss * lse).unsqueeze(1)
    if terms.smoothing:
        softmax = softmax - terms.smoothing / logits.shape[1]
    columns = torch.arange(logits.shape[1], device=logits.device)
    of_rows = torch.where(columns == labels.unsqueeze(1), softmax - (1.0 - terms.smoothing), softmax) * gradient
    return of_rows.where((labels != terms.ignore_index).unsqueeze(1), 0.0).to(logits.dtype)


def overwriting_pass(
    gradient: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, terms: LossTerms
) -> None:
    """`backward_pass`, written over the logits."""
    logits.copy_(backward_pass(gradient, logits, labels, lse, terms))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, terms: LossTerms, passes: _Passes, overwrite: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, count, lse = passes.forward(logits.detach(), labels, terms)
        ctx.save_for_backward(logits, labels, lse)
        ctx.mark_non_differentiable(count)
        ctx.terms, ctx.passes, ctx.overwrite = terms, passes, overwrite
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, of_count: object) -> tuple[torch.Tensor, None, None, None, None]:
        del of_count
        logits, labels, lse = ctx.saved_tensors
        logits = logits.detach()
        if ctx.overwrite:
            ctx.passes.overwrite(gradient, logits, labels, lse, ctx.terms)
            return logits, None, None, None, None
        return ctx.passes.backward(gradient, logits, labels, lse, ctx.terms), None, None, None, None
