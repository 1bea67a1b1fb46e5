"""Reference output projection and cross-entropy in one, without ever holding all logits. Legend: N rows, D features,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from colossal_core.ops.cross_entropy import LossTerms, row_gradients, row_losses
from colossal_core.ops.norms import statistics_dtype

LOGITS_BYTES = 448 * 2**20
"""Of a chunk, in the dtype of the hidden states. 8192 rows of 4096 features over 128256 words in bfloat16: with both gradients, which are
1066 MiB, under 1.5 GiB."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    budget_bytes: int = LOGITS_BYTES,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """The sum of `cross_entropy(hidden @ weight^T + bias, labels)`, a chunk of rows at a time.

    hidden: [..., D]; weight: [V, D]; bias: [V] or None; labels: [...] integers, already shifted; ignore_index, z_loss,
    smoothing: `cross_entropy`'s. Returns the sum, 0-d in float32 (float64 for float64). budget_bytes: what the logits
    that exist at a time may take in hidden's dtype, at least one row; this reference holds float32 copies beside them.
    Each chunk's gradient with respect to its logits is turned into those of hidden, weight and bias at once, in the
    forward pass, where autograd is on; backward only scales them (the order of work that Hsu et al. 2024, section 3.2,
    describe). The weight's gradient is summed over the chunks in the statistic's dtype.
    """
    assert hidden.shape[:-1] == labels.shape, f"hidden {tuple(hidden.shape)} does not fit labels {tuple(labels.shape)}"
    rows = hidden.reshape(-1, hidden.shape[-1])
    terms = LossTerms(ignore_index, z_loss, smoothing)
    chunk = most_rows(weight.shape[0], hidden.dtype, budget_bytes)
    settings = (chunk, terms, torch.is_grad_enabled())  # asked here: inside `forward` it is always off
    total: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, weight, bias, labels.reshape(-1), settings
    )
    return total


def most_rows(vocabulary: int, dtype: torch.dtype, budget_bytes: int) -> int:
    """Rows of logits that a budget holds, at least one."""
    return max(1, budget_bytes // max(1, vocabulary * dtype.itemsize))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        settings: tuple[int, LossTerms, bool],
    ) -> torch.Tensor:
        chunk, terms, needs_gradient = settings
        wide = statistics_dtype(hidden.dtype)
        needs_hidden, needs_weight, needs_bias = (needs_gradient and needed for needed in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs_bias else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ weight.T if bias is None else torch.addmm(bias, hidden[rows], weight.T)
            losses, lse = row_losses(logits, labels[rows], terms)
            total += losses.sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            grad_logits_wide = row_gradients(logits, lse, labels[rows], terms)
            grad_logits = grad_logits_wide.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad_logits_wide.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        # Of one dimension: on a GPU a number of none would be rounded to the hidden states' dtype before it is multiplied.
        factor = grad_total.reshape(1)
        return (
            None if grad_hidden is None else (grad_hidden * factor).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * factor).to(weight_dtype),
            None if grad_bias is None else (grad_bias * factor).to(bias_dtype),
            None,
            None,
        )
