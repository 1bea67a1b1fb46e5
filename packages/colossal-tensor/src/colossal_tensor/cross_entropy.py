"""Cross-entropy of logits that are cut by words (Shoeybi et al. 2019, section 3: the loss is taken where the logits are, and only
numbers of one row are sent). Legend: N rows (all leading dimensions flattened), V/tp columns of a rank, of which the first are its words
and the rest padding.

Between forward and backward each rank keeps its logits as they are and one float32 a row; the only tensor of their size that is made is
their gradient, in their own dtype. Eager, rows are taken in chunks, as core's reference does; compiled, each pass reads the logits once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.autograd.function import once_differentiable

from colossal_core._torch_private import is_fake
from colossal_core.ops.compiled_cross_entropy import compiled_cross_entropy
from colossal_core.ops.cross_entropy import cross_entropy, rows_per_chunk
from colossal_core.ops.norms import statistics_dtype
from colossal_tensor.operators import Route, all_reduced

if TYPE_CHECKING:
    from colossal_core.collectives import Axes, Collectives


@dataclass(frozen=True)
class Words:
    """The words of one rank: [start, stop) of `total`; its logits may have more columns, which are padding and never count."""

    start: int
    stop: int
    total: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Passes:
    """The elementwise parts `row_statistics`, `rescaled`, `row_losses` and `row_gradients`: as they are, in chunks of rows, or compiled."""

    statistics: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rescaled: Callable[..., torch.Tensor]
    losses: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    gradients: Callable[..., torch.Tensor]


class Readings:
    """Whether the forward pass that runs is one whose logits this loss reads. A copy of a model, and of its hooks, asks the same one."""

    def __init__(self) -> None:
        self.is_open = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        before, self.is_open = self.is_open, True
        try:
            yield
        finally:
            self.is_open = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        del memo
        return self


@dataclass(frozen=True, eq=False)
class VocabularyCrossEntropy:
    """The op `cross_entropy` (signature, meaning and dtypes of core's) on logits [..., V/tp] of this rank's words. Make it with
    `vocabulary_cross_entropy`; it works eagerly and inside torch.compile.

    Every rank gets the same sum and count. The gradient of the sum that arrives is the whole one on every rank.
    Communication over the axes, forward: an all-reduce (max) of N and one (sum) of 2 N numbers in float32 (float64 for float64 logits);
    backward: nothing. One rank: core's own op.
    """

    route: Route
    words: Words
    passes: Passes
    alone: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    readings: Readings = field(default_factory=Readings)

    def reading(self) -> AbstractContextManager[None]:
        """While it is open, the head whose logits these are leaves them cut."""
        return self.readings.opened()

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100, *, overwrite: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits: [..., V/tp] floating; labels: [...] words of the whole vocabulary, already shifted; `ignore_index` does not count.
        overwrite: as core's, where the backward pass is eager.
        """
        assert logits.shape[:-1] == labels.shape, (
            f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}"
        )
        words = self.words
        assert logits.shape[-1] >= words.size, f"logits {tuple(logits.shape)} for {words.size} words"
        # Inside torch.compile the passes are part of what is compiled, and what it keeps may not be overwritten.
        tracing = torch.compiler.is_compiling()
        if self.route.size == 1 and not tracing:
            return self.alone(logits[..., : words.size], labels, ignore_index, overwrite=overwrite)
        rows, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        passes, overwrite = (PLAIN, False) if tracing else (self.passes, overwrite)
        if not tracing and is_fake(logits):
            passes = IN_CHUNKS  # memory is being estimated: the compiled passes make no more tensors than these
        total: torch.Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
            rows, labels, ignore_index, words, self.route.key, passes, overwrite
        )
        return total, (labels != ignore_index).sum()

    def compiled(self, backend: str, *, dynamic: bool) -> Self:
        """The same loss with its elementwise passes compiled by torch.compile, on first use: what the strategy `compile` does with
        core's.
        """

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, backend=backend, dynamic=dynamic)

        passes = Passes(compiled(row_statistics), compiled(rescaled), compiled(row_losses), compiled(row_gradients))
        return replace(self, passes=passes, alone=compiled_cross_entropy(backend, dynamic=dynamic))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        del memo
        return self


def vocabulary_cross_entropy(
    collectives: Collectives, axes: Axes, words: Words, *, tag: str = "loss"
) -> VocabularyCrossEntropy:
    """Cross-entropy over a vocabulary that is cut over `axes`."""
    return VocabularyCrossEntropy(Route(collectives, axes, tag), words, IN_CHUNKS, cross_entropy)


def row_statistics(
    logits: torch.Tensor, labels: torch.Tensor, words: Words, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit [N] of this rank's words, and [N, 2]: the sum of exponentials relative to it, and the label's logit where the word
    is this rank's, else 0. In the statistic's dtype. Without words: -inf, 0 and 0.
    """
    wide = logits[:, : words.size].to(statistics_dtype(logits.dtype))
    if words.size == 0:
        none = torch.zeros(len(labels), dtype=wide.dtype, device=wide.device)
        return none - math.inf, torch.stack([none, none], dim=1)
    largest = wide.amax(dim=1)
    exponentials = (wide - _shift(largest).unsqueeze(1)).exp().sum(dim=1)
    own = (labels >= words.start) & (labels < words.stop) & (labels != ignore_index)
    places = (labels - words.start).where(own, 0).unsqueeze(1)
    chosen = logits.gather(1, places).squeeze(1).to(wide.dtype).where(own, 0.0)
    return largest, torch.stack([exponentials, chosen], dim=1)


def _shift(largest: torch.Tensor) -> torch.Tensor:
    """What is taken off before exponentials: an infinity stays in, or it would become inf - inf."""
    return largest.where(largest.abs() != math.inf, 0.0)


def rescaled(numbers: torch.Tensor, own_largest: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The numbers of `row_statistics` with the exponentials relative to the largest logit of all ranks: [N, 2]."""
    exponentials, chosen = numbers.unbind(1)
    # Where a rank's words are all -inf its sum is 0, and must stay so whatever the others have.
    factor = (own_largest - _shift(largest)).exp()
    finite = own_largest.abs() != math.inf
    return torch.stack([torch.where(finite, exponentials * factor, exponentials), chosen], dim=1)


def row_losses(
    numbers: torch.Tensor, largest: torch.Tensor, labels: torch.Tensor, words: Words, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of losses 0-d and logsumexp [N], from the sums over the ranks. NaN for a label that is no word: as no rank has it, it would
    count as a logit of 0.
    """
    exponentials, chosen = numbers.unbind(1)
    lse = exponentials.log() + _shift(largest)
    losses = (lse - chosen).where((labels >= 0) & (labels < words.total), math.nan)
    return losses.where(labels != ignore_index, 0.0).sum(), lse


def row_gradients(
    gradient: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    words: Words,
    ignore_index: int,
    overwrite: bool,
) -> torch.Tensor:
    """d(gradient x sum of losses) / d(logits): [N, V/tp] in their dtype, zero in padding, and in ignored rows even where the logits are not
    finite. overwrite: written over the logits, which are what is returned.
    """
    softmax = (logits.to(lse.dtype) - lse.unsqueeze(1)).exp()
    columns = torch.arange(logits.shape[1], device=logits.device)
    of_rows = torch.where(columns == (labels - words.start).unsqueeze(1), softmax - 1.0, softmax) * gradient
    counted = (labels != ignore_index).unsqueeze(1) & (columns < words.size)
    found = of_rows.where(counted, 0.0).to(logits.dtype)
    return logits.copy_(found) if overwrite else found


def _statistics_in_chunks(
    logits: torch.Tensor, labels: torch.Tensor, words: Words, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    step = rows_per_chunk(logits.shape[1])
    chunks = zip(torch.split(logits, step), torch.split(labels, step), strict=True)
    found = [row_statistics(some_logits, some_labels, words, ignore_index) for some_logits, some_labels in chunks]
    return torch.cat([largest for largest, _ in found]), torch.cat([numbers for _, numbers in found])


def _gradients_in_chunks(
    gradient: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, *decided: Any
) -> torch.Tensor:
    """decided: the rest of `row_gradients`' arguments, `overwrite` the last."""
    found = None if decided[-1] else torch.empty_like(logits)
    step = rows_per_chunk(logits.shape[1])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        part = row_gradients(gradient, logits[rows], labels[rows], lse[rows], *decided)
        if found is not None:
            found[rows] = part
    return logits if found is None else found


PLAIN = Passes(row_statistics, rescaled, row_losses, row_gradients)
IN_CHUNKS = Passes(_statistics_in_chunks, rescaled, row_losses, _gradients_in_chunks)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        ignore_index: int,
        words: Words,
        key: str,
        passes: Passes,
        overwrite: bool,
    ) -> torch.Tensor:
        own_largest, numbers = passes.statistics(logits.detach(), labels, words, ignore_index)
        largest = all_reduced(own_largest, key, "max")
        numbers = all_reduced(passes.rescaled(numbers, own_largest, largest), key, "sum")
        total, lse = passes.losses(numbers, largest, labels, words, ignore_index)
        ctx.save_for_backward(logits, labels, lse)
        ctx.decided = (ignore_index, words, passes, overwrite)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        ignore_index, words, passes, overwrite = ctx.decided
        found = passes.gradients(gradient, logits.detach(), labels, lse, words, ignore_index, overwrite)
        return found, None, None, None, None, None, None
