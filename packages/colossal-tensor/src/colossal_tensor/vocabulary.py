"""The table of embeddings and the head, cut by words (Shoeybi et al. 2019, section 3: vocabulary-parallel embedding)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from colossal_tensor.forwards import unbound
from colossal_tensor.group import TensorPlan
from colossal_tensor.layouts import AXIS, Cutting

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_tensor.cross_entropy import Readings


def install_vocabulary(model: nn.Module, plan: TensorPlan, cutting: Cutting, collectives: Collectives) -> None:
    """Makes embedding and head compute with this rank's words.

    Communication: an all-reduce of the embeddings [B, S, D]; at the head the gradient of its input is summed, by an all-reduce, or by the
    reduce-scatter of the place where a cut sequence is gathered.
    """
    vocabulary = plan.vocabulary
    if vocabulary.embedding:
        start, stop = cutting.words[collectives.index(AXIS)]
        for table in _tables(model, vocabulary.embedding):
            padding = table.padding_idx
            table.padding_idx = padding - start if padding is not None and start <= padding < stop else None
            table.num_embeddings = cutting.padded_words
            table.forward = MethodType(_Lookup(collectives, start, stop, unbound(table)), table)  # type: ignore[method-assign]
    if vocabulary.head:
        head = model.get_submodule(vocabulary.head)
        if isinstance(head, nn.Linear):
            head.out_features = cutting.padded_words
        gathered_before = plan.stream is not None and any(
            entry.module == vocabulary.head for entry in plan.stream.gathered_at
        )
        if not gathered_before:
            head.register_forward_pre_hook(_HeadEntry(collectives).before)
        if vocabulary.gathered:
            head.register_forward_hook(_HeadExit(collectives, cutting.words[-1][1]).after)


def install_whole_logits(
    model: nn.Module, head: str, cutting: Cutting, collectives: Collectives, unless: Readings
) -> None:
    """Makes a head that leaves its logits cut gather them, unless the forward pass is one for the loss that reads them so: a user who
    calls the model gets what one process gives.

    Communication of such a call: an all-gather of the logits.
    """
    model.get_submodule(head).register_forward_hook(_HeadExit(collectives, cutting.words[-1][1], unless).after)


def _tables(model: nn.Module, name: str) -> list[nn.Embedding]:
    """The embedding, and every other one that looks up in the same table (encoder and decoder have one each)."""
    table = model.get_submodule(name)
    assert isinstance(table, nn.Embedding), f"{name} is a {type(table).__name__}"
    return [module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight is table.weight]


@dataclass(frozen=True)
class _Lookup:
    """An embedding module's forward on the words [start, stop): the rows of other words are zero, and the ranks' rows are summed."""

    collectives: Collectives
    start: int
    stop: int
    forward: Any

    def __call__(self, module: nn.Module, input: torch.Tensor) -> torch.Tensor:
        other = (input < self.start) | (input >= self.stop)
        local = torch.where(other, 0, input - self.start)
        rows = self.forward(module, local).masked_fill(other.unsqueeze(-1), 0.0)
        return self.collectives.all_reduce(rows, AXIS, cotangent="replicated", tag="embedding")


@dataclass(frozen=True)
class _HeadEntry:
    collectives: Collectives

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (self.collectives.replicate(args[0], AXIS, tag="head"), *args[1:])


@dataclass(frozen=True)
class _HeadExit:
    """The whole vocabulary on every rank. words: its size without padding; unless: nobody reads more than a part while it is open."""

    collectives: Collectives
    words: int
    unless: Readings | None = None

    def after(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        del module, args
        if self.unless is not None and self.unless.is_open:
            return output
        whole = self.collectives.all_gather(output, AXIS, dim=-1, cotangent="replicated", tag="logits")
        return whole.narrow(-1, 0, self.words)
