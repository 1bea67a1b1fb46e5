"""Cross-entropy of logits that are cut by words (Shoeybi et al. 2019, section 3: the loss is taken where the logits are, and only
numbers of one row are sent). Legend: N rows (all leading dimensions flattened), V/tp columns of a rank, of which the first are its words
and the rest padding.

Between forward and backward each rank keeps its logits as they are and one float32 a row; the only tensor of their size that is made is
their gradient, in their own dtype. What a rank computes of its logits are core's ops `vocabulary_statistics` and `vocabulary_gradient`:
kernels, where the op table has them; else the references, eager in chunks of rows, compiled by one read of the logits a pass.
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
from colossal_core.ops.cross_entropy import LossTerms, cross_entropy, joined_losses
from colossal_core.ops.vocabulary import (
    Words,
    row_gradients,
    row_statistics,
    shift,
    vocabulary_gradient,
    vocabulary_statistics,
)
from colossal_tensor.operators import Route, all_reduced

if TYPE_CHECKING:
    from colossal_core.collectives import Axes, Collectives
    from colossal_core.ops import OpTable

__all__ = ["VocabularyCrossEntropy", "Words", "vocabulary_cross_entropy"]


@dataclass(frozen=True)
class Passes:
    """The parts that need no other rank: core's ops `vocabulary_statistics` and `vocabulary_gradient` in one of their forms, and between
    them `rescaled` and `row_losses`, as they are or compiled. are_kernels: the ops are kernels, which stand in compiled code as they are.
    """

    statistics: Callable[..., torch.Tensor]
    rescaled: Callable[..., torch.Tensor]
    losses: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    gradients: Callable[..., torch.Tensor]
    are_kernels: bool = False


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
    Communication over the axes, forward: an all-reduce (max) of N and one (sum) of 2 N numbers, with smoothing 3 N, in float32 (float64
    for float64 logits); backward: nothing. One rank: core's own op.
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
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        ignore_index: int = -100,
        *,
        overwrite: bool = False,
        z_loss: float = 0.0,
        smoothing: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits: [..., V/tp] floating; labels: [...] words of the whole vocabulary, already shifted; `ignore_index` does not count.
        overwrite: as core's, where the backward pass is eager. z_loss, smoothing: as core's, over the whole vocabulary.
        """
        terms = LossTerms(ignore_index, z_loss, smoothing)
        assert logits.shape[:-1] == labels.shape, (
            f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}"
        )
        words = self.words
        assert logits.shape[-1] >= words.size, f"logits {tuple(logits.shape)} for {words.size} words"
        # Inside torch.compile the passes are part of what is compiled, and what it keeps may not be overwritten.
        tracing = torch.compiler.is_compiling()
        if self.route.size == 1 and not tracing:
            own = logits[..., : words.size]
            return self.alone(own, labels, ignore_index, overwrite=overwrite, z_loss=z_loss, smoothing=smoothing)
        rows, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        passes, overwrite = (self._traced, False) if tracing else (self.passes, overwrite)
        if not tracing and is_fake(logits) and not passes.are_kernels:
            passes = IN_CHUNKS  # memory is being estimated: the compiled passes make no more tensors than these
        total: torch.Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
            rows, labels, terms, words, self.route.key, passes, overwrite
        )
        return total, (labels != ignore_index).sum()

    @property
    def _traced(self) -> Passes:
        """What stands in code that is compiled."""
        return replace(self.passes, rescaled=rescaled, losses=row_losses) if self.passes.are_kernels else PLAIN

    def compiled(self, backend: str, *, dynamic: bool) -> Self:
        """The same loss with its elementwise passes compiled by torch.compile, on first use: what the strategy `compile` does with
        core's. Kernels are left as they are.
        """

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, backend=backend, dynamic=dynamic)

        joining = replace(self.passes, rescaled=compiled(rescaled), losses=compiled(row_losses))
        if joining.are_kernels:
            return replace(self, passes=joining)
        passes = replace(joining, statistics=compiled(row_statistics), gradients=_compiled_gradients(compiled))
        return replace(self, passes=passes, alone=compiled_cross_entropy(backend, dynamic=dynamic))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        del memo
        return self


def vocabulary_cross_entropy(
    collectives: Collectives, axes: Axes, words: Words, ops: OpTable | None = None, *, tag: str = "loss"
) -> VocabularyCrossEntropy:
    """Cross-entropy over a vocabulary that is cut over `axes`. ops: what computes it; None: the references."""
    route = Route(collectives, axes, tag)
    if ops is None:
        return VocabularyCrossEntropy(route, words, IN_CHUNKS, cross_entropy)
    names = ("vocabulary_statistics", "vocabulary_gradient")
    if any(ops.chosen[name].provider == "reference" for name in names):
        return VocabularyCrossEntropy(route, words, IN_CHUNKS, ops["cross_entropy"])
    statistics, gradients = (ops[name] for name in names)
    passes = Passes(statistics, rescaled, row_losses, gradients, are_kernels=True)
    return VocabularyCrossEntropy(route, words, passes, ops["cross_entropy"])


def _compiled_gradients(compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[..., torch.Tensor]:
    """`vocabulary_gradient` of all rows at once, compiled with and without the copy over the logits."""
    apart, over = compiled(row_gradients), compiled(_overwriting)

    def gradients(scale: torch.Tensor, logits: torch.Tensor, *rest: Any, overwrite: bool = False) -> torch.Tensor:
        found: torch.Tensor = (over if overwrite else apart)(scale, logits, *rest)
        return found

    return gradients


def _overwriting(scale: torch.Tensor, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
    return logits.copy_(row_gradients(scale, logits, *rest))


def _whole_gradients(scale: torch.Tensor, logits: torch.Tensor, *rest: Any, overwrite: bool = False) -> torch.Tensor:
    assert not overwrite, "what is traced keeps its logits"
    return row_gradients(scale, logits, *rest)


def rescaled(numbers: torch.Tensor, own_largest: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """What `vocabulary_statistics` says besides the maximum, [2 or 3, N], with the exponentials relative to the largest logit of all
    ranks.
    """
    exponentials, *rest = numbers.unbind(0)
    # Where a rank's words are all -inf its sum is 0, and must stay so whatever the others have.
    factor = (own_largest - shift(largest)).exp()
    finite = own_largest.abs() != math.inf
    return torch.stack([torch.where(finite, exponentials * factor, exponentials), *rest])


def row_losses(
    numbers: torch.Tensor, largest: torch.Tensor, labels: torch.Tensor, words: Words, terms: LossTerms
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of losses 0-d and logsumexp [N], from the sums over the ranks. NaN for a label that is no word: as no rank has it, it would
    count as a logit of 0.
    """
    exponentials, chosen, *rest = numbers.unbind(0)
    lse = exponentials.log() + shift(largest)
    mean = rest[0] / words.total if rest else None
    losses = joined_losses(lse, chosen, mean, terms).where((labels >= 0) & (labels < words.total), math.nan)
    return losses.where(labels != terms.ignore_index, 0.0).sum(), lse


PLAIN = Passes(row_statistics, rescaled, row_losses, _whole_gradients)
IN_CHUNKS = Passes(vocabulary_statistics, rescaled, row_losses, vocabulary_gradient)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        terms: LossTerms,
        words: Words,
        key: str,
        passes: Passes,
        overwrite: bool,
    ) -> torch.Tensor:
        statistics = passes.statistics(logits.detach(), labels, words, terms)
        own_largest, numbers = statistics[0], statistics[1:]
        largest = all_reduced(own_largest, key, "max")
        numbers = all_reduced(passes.rescaled(numbers, own_largest, largest), key, "sum")
        total, lse = passes.losses(numbers, largest, labels, words, terms)
        ctx.save_for_backward(logits, labels, lse)
        ctx.decided = (words, terms, passes, overwrite)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        words, terms, passes, overwrite = ctx.decided
        found = passes.gradients(gradient, logits.detach(), labels, lse, words, terms, overwrite=overwrite)
        return found, None, None, None, None, None, None
