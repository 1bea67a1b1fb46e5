"""Cross-entropy from logits, with z-loss and smoothing: one read forward, one read and one write backward, 6 bytes a logit in bfloat16. The
formula is the reference's. Between the passes the logits and one float32 a row are kept; in the place of the logits, their gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colossal_core.ops import cross_entropy as reference
from colossal_core.ops.cross_entropy import LossTerms
from colossal_core.ops.vocabulary import Words
from colossal_kernels.builds import Build
from colossal_kernels.library import define, differentiate
from colossal_kernels.losses.rows import losses, row_builds
from colossal_kernels.losses.vocabulary import gradient


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    overwrite: bool = False,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`colossal_core.ops.reference.cross_entropy`, computed in float32 throughout.

    Rows may be any distance apart; other layouts are copied. A label that is neither a word nor ignored gives NaN. Inside torch.compile
    `overwrite` is left to the compiler.
    """
    terms = LossTerms(ignore_index, z_loss, smoothing)
    assert logits.shape[:-1] == labels.shape, f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}"
    if logits.dtype == torch.float64 or logits.numel() == 0:
        return reference.cross_entropy(
            logits, labels, ignore_index, overwrite=overwrite, z_loss=z_loss, smoothing=smoothing
        )
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    over = overwrite and not torch.compiler.is_compiling()
    total: Tensor = _FORWARD(rows, labels.reshape(-1).contiguous(), ignore_index, terms.z_loss, terms.smoothing, over)[
        0
    ]
    return total, (labels != ignore_index).sum()


def _forward(
    logits: Tensor, labels: Tensor, ignore_index: int, z_loss: float, smoothing: float, overwrite: bool
) -> tuple[Tensor, Tensor]:
    del overwrite
    found, lse = losses(logits, labels, LossTerms(ignore_index, z_loss, smoothing))
    return found.sum(), lse


def _forward_fake(
    logits: Tensor, labels: Tensor, ignore_index: int, z_loss: float, smoothing: float, overwrite: bool
) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=torch.float32), logits.new_empty(labels.shape, dtype=torch.float32)


_FORWARD = define(
    "cross_entropy(Tensor logits, Tensor labels, int ignore_index, float z_loss, float smoothing, bool overwrite)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, *numbers, overwrite = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.terms, ctx.overwrite = LossTerms(*numbers), overwrite


def _gradients(ctx: Any, grad_total: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    del grad_lse
    rest = (None,) * 5
    if grad_total is None:
        return None, *rest
    logits, labels, lse = ctx.saved_tensors
    words = Words(0, logits.shape[1], logits.shape[1])
    return gradient(grad_total, logits, labels, lse, words, ctx.terms, overwrite=ctx.overwrite), *rest


differentiate("cross_entropy", _gradients, _save)


def builds() -> tuple[Build, ...]:
    """A Llama's vocabulary; those of `vocabulary` are the same kernels."""
    return (*row_builds("bf16"), *row_builds("fp32"))
