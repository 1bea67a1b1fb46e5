"""What a rank computes of the cross-entropy of logits that are cut by words: statistics by one read of its columns, their gradient by one
read and one write. The formulas are the references'; what is sent between the two is not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colossal_core.ops import vocabulary as reference
from colossal_core.ops.cross_entropy import LossTerms
from colossal_core.ops.vocabulary import Words
from colossal_kernels.builds import Build
from colossal_kernels.library import define
from colossal_kernels.losses.rows import statistics, write_gradient


def vocabulary_statistics(logits: Tensor, labels: Tensor, words: Words, terms: LossTerms) -> Tensor:
    """`colossal_core.ops.reference.vocabulary_statistics`. Rows may be any distance apart; other layouts are copied."""
    if logits.dtype == torch.float64 or logits.numel() == 0:
        return reference.vocabulary_statistics(logits, labels, words, terms)
    rows = logits.detach()
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    found: Tensor = _STATISTICS(rows, labels.contiguous(), *_numbers(words, terms))
    return found


def vocabulary_gradient(
    scale: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    words: Words,
    terms: LossTerms,
    *,
    overwrite: bool = False,
) -> Tensor:
    """`colossal_core.ops.reference.vocabulary_gradient`. Rows may be any distance apart; other layouts are copied, and then, or where rows
    overlap, nothing is overwritten.
    """
    if logits.dtype == torch.float64 or lse.dtype != torch.float32 or logits.numel() == 0:
        return reference.vocabulary_gradient(scale, logits, labels, lse, words, terms, overwrite=overwrite)
    given = (scale, logits, labels.contiguous(), lse.detach().contiguous())
    return gradient(*given, words, terms, overwrite=overwrite)


def gradient(
    scale: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, words: Words, terms: LossTerms, *, overwrite: bool
) -> Tensor:
    """`vocabulary_gradient` of at least one row, whose layouts are right but for the logits'. Not differentiable."""
    scale, logits = scale.detach(), logits.detach()
    num_rows, num_columns = logits.shape
    if logits.stride(-1) != 1 and num_columns != 1:
        return gradient(scale, logits.contiguous(), labels, lse, words, terms, overwrite=True)
    overlap = (
        num_rows > 1 and logits.stride(0) < num_columns
    )  # as `expand` makes them: a row that is written is another's too
    if overwrite and not overlap and not torch.compiler.is_compiling():
        _OVERWRITE(scale, logits, labels, lse, *_numbers(words, terms))
        # torch counts no version for operators of its library, and a second backward pass must fail.
        torch.autograd.graph.increment_version(logits)
        return logits
    found: Tensor = _GRADIENT(scale, logits, labels, lse, *_numbers(words, terms))
    return found


def _numbers(words: Words, terms: LossTerms) -> tuple[int, int, int, int, float, float]:
    return words.start, words.stop, words.total, terms.ignore_index, float(terms.z_loss), float(terms.smoothing)


def _statistics(
    logits: Tensor,
    labels: Tensor,
    start: int,
    stop: int,
    total: int,
    ignore_index: int,
    z_loss: float,
    smoothing: float,
) -> Tensor:
    return statistics(logits, labels, Words(start, stop, total), LossTerms(ignore_index, z_loss, smoothing))


def _statistics_fake(
    logits: Tensor,
    labels: Tensor,
    start: int,
    stop: int,
    total: int,
    ignore_index: int,
    z_loss: float,
    smoothing: float,
) -> Tensor:
    return logits.new_empty((3 + (smoothing != 0.0), logits.shape[0]), dtype=torch.float32)


def _overwrite(
    scale: Tensor, logits: Tensor, labels: Tensor, lse: Tensor,
    start: int, stop: int, total: int, ignore_index: int, z_loss: float, smoothing: float,
) -> None:  # fmt: skip
    terms = LossTerms(ignore_index, z_loss, smoothing)
    write_gradient(scale, logits, labels, lse, Words(start, stop, total), terms, logits)


def _overwrite_fake(
    scale: Tensor, logits: Tensor, labels: Tensor, lse: Tensor,
    start: int, stop: int, total: int, ignore_index: int, z_loss: float, smoothing: float,
) -> None:  # fmt: skip
    return None


def _gradient(
    scale: Tensor, logits: Tensor, labels: Tensor, lse: Tensor,
    start: int, stop: int, total: int, ignore_index: int, z_loss: float, smoothing: float,
) -> Tensor:  # fmt: skip
    found = logits.new_empty(logits.shape)
    terms = LossTerms(ignore_index, z_loss, smoothing)
    write_gradient(scale, logits, labels, lse, Words(start, stop, total), terms, found)
    return found


def _gradient_fake(
    scale: Tensor, logits: Tensor, labels: Tensor, lse: Tensor,
    start: int, stop: int, total: int, ignore_index: int, z_loss: float, smoothing: float,
) -> Tensor:  # fmt: skip
    return logits.new_empty(logits.shape)


_NUMBERS = "int start, int stop, int total, int ignore_index, float z_loss, float smoothing"
_STATISTICS = define(
    f"vocabulary_statistics(Tensor logits, Tensor labels, {_NUMBERS}) -> Tensor", _statistics, _statistics_fake
)
_GRADIENT = define(
    f"vocabulary_gradient(Tensor scale, Tensor logits, Tensor labels, Tensor lse, {_NUMBERS}) -> Tensor",
    _gradient,
    _gradient_fake,
)
_OVERWRITE = define(
    f"vocabulary_gradient_(Tensor scale, Tensor(a!) logits, Tensor labels, Tensor lse, {_NUMBERS}) -> ()",
    _overwrite,
    _overwrite_fake,
)


def builds() -> tuple[Build, ...]:
    """Those of `cross_entropy`, which are the same."""
    return ()
