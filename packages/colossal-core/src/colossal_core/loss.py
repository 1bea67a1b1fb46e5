"""The loss has one owner. Items are counted from the labels before the first forward pass and summed once over the data axes; every
microbatch's sum of losses is divided by that total before backward; all gradient reductions are plain sums. So the gradient is that of
(sum of losses) / (items in the global batch), however unevenly the items fall on ranks and microbatches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from colossal_core.errors import ColossalError
from colossal_core.transformers_checks import FirstAnswers

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.anatomy import ModelAnatomy, Task
    from colossal_core.ops import OpTable
    from colossal_core.strategy import CrossEntropy

Batch = Mapping[str, torch.Tensor]
LossFunction = Callable[[Any, Batch], tuple[torch.Tensor, "torch.Tensor | int"]]
Reading = Callable[[], AbstractContextManager[None]]
IGNORED_LABEL = -100
PRODUCTS = ("MmBackward0", "AddmmBackward0", "BmmBackward0", "BaddbmmBackward0")
VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0", "SliceBackward0")
"""Nodes of autograd's graph, by name."""


@dataclass(frozen=True)
class MicrobatchLoss:
    """sum: 0-d, the microbatch's sum of losses, differentiable. items: 0-d float64, how many items it is the sum of."""

    sum: torch.Tensor
    items: torch.Tensor


class LossOwner:
    """Runs the forward pass of one microbatch and says what its loss is.

    task and user_loss decide: a user's `loss_fn`; else core's cross-entropy on the logits of a language model; else the model's own
    `.loss`, taken as the mean over the first dimension. cross_entropy: in the place of the op, from a strategy that
    leaves logits cut. `exact_count` says whether the items are known before the forward pass.
    """

    def __init__(
        self,
        anatomy: ModelAnatomy,
        ops: OpTable,
        user_loss: LossFunction | None,
        cross_entropy: CrossEntropy | None = None,
    ) -> None:
        self._task: Task = anatomy.task
        self._forward_keys = anatomy.forward_keys
        self._cross_entropy = ops["cross_entropy"] if cross_entropy is None else cross_entropy
        self._reading: Reading = nullcontext if cross_entropy is None else cross_entropy.reading
        self._user_loss = user_loss
        self._answers = FirstAnswers()

    def with_ops(self, ops: OpTable) -> LossOwner:
        """The same loss on other kernels, of logits that are whole."""
        twin = copy.copy(self)
        twin._cross_entropy, twin._reading = ops["cross_entropy"], nullcontext
        return twin

    def with_cross_entropy(self, cross_entropy: CrossEntropy) -> LossOwner:
        """The same loss, made by this of logits that a strategy has left cut."""
        twin = copy.copy(self)
        twin._cross_entropy, twin._reading = cross_entropy, cross_entropy.reading
        return twin

    @property
    def exact_count(self) -> bool:
        return self._user_loss is None

    def is_input(self, key: str) -> bool:
        """Whether a batch key is an input of the model's forward pass, and not only something to compare its outputs with."""
        return key != "labels" and (self._forward_keys is None or key in self._forward_keys)

    def with_targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The batch with each position's label the one that it predicts. For a causal model they move left by one, before anything cuts the
        sequence; the logits are never sliced or copied. A user's loss and a model's own get the labels as they are.

        Raises: ColossalError where the loss is core's and there are no labels.
        """
        found = dict(batch)
        if self._user_loss is None and self._task != "own-loss" and "labels" not in found:
            message = (
                f"batch.labels: is missing, and the loss of a {self._task} model is made from it: "
                "add it (-100 where nothing is to be predicted), or pass loss_fn"
            )
            raise ColossalError(message)
        if self._user_loss is None and self._task == "causal-lm":
            labels = found["labels"]
            found["labels"] = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED_LABEL)], dim=1)
        return found

    def count_items(self, batch: Batch) -> torch.Tensor:
        """Items in a batch `with_targets`: 0-d float64. Labels that count in the loss, else sequences (provisional for a user's loss)."""
        labels = batch.get("labels")
        if labels is not None and labels.dim() >= 2 and not labels.is_floating_point() and self._task != "own-loss":
            return (labels != IGNORED_LABEL).sum().to(torch.float64)
        first = next(iter(batch.values()))
        return torch.full((), float(first.shape[0]), dtype=torch.float64, device=first.device)

    def __call__(self, model: nn.Module, batch: Batch) -> MicrobatchLoss:
        """Forward pass and loss of one microbatch, cut from a batch `with_targets`.

        Raises: ColossalError when the model gives neither logits nor a loss and there is no `loss_fn`.
        """
        if self._user_loss is not None:
            outputs = self._outputs(model, batch, with_labels=False)
            total, items = self._user_loss(outputs, batch)
            return MicrobatchLoss(total, _number(items, total.device))
        if self._task == "own-loss":
            outputs = self._outputs(model, batch, with_labels=True)
            mean = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
            if mean is None:
                message = (
                    "loss_fn: the model returns no `.loss` and is not a language model: "
                    "pass loss_fn(outputs, batch) -> (sum of losses, number of items)"
                )
                raise ColossalError(message)
            items = self.count_items(batch)
            return MicrobatchLoss(mean * items.to(mean.dtype), items)
        with self._reading():
            outputs = self._outputs(model, batch, with_labels=False)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
        if logits is None:
            message = (
                f"loss_fn: the model returns {type(outputs).__name__} without `.logits`, from which the loss is made: "
                "let it return them by that name (transformers: return_dict=True), or pass loss_fn"
            )
            raise ColossalError(message)
        # Nobody is handed the outputs, so the logits' memory may become that of their gradient: the peak of a step is here.
        total, items = self._cross_entropy(logits, batch["labels"], overwrite=is_product(logits))
        return MicrobatchLoss(total, items.to(torch.float64))

    def _outputs(self, model: nn.Module, batch: Batch, *, with_labels: bool) -> Any:
        inputs = self._inputs(model, batch, with_labels=with_labels)
        with nullcontext() if "position_ids" in inputs else self._answers.remembered(model):
            return model(**inputs)

    def _inputs(self, model: nn.Module, batch: Batch, *, with_labels: bool) -> dict[str, Any]:
        """The keys that forward takes. A sequence-to-sequence model gets its decoder inputs made from the labels, by its own rule; a model
        that would keep keys and values for generation does not.
        """
        keys = batch.keys() if self._forward_keys is None else [key for key in batch if key in self._forward_keys]
        inputs: dict[str, Any] = {key: batch[key] for key in keys if with_labels or key != "labels"}
        if self._forward_keys is not None and "use_cache" in self._forward_keys:
            inputs.setdefault("use_cache", False)
        if self._task == "seq2seq-lm" and not with_labels and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = decoder_inputs(model, batch["labels"])
        return inputs


def is_product(value: torch.Tensor) -> bool:
    """Whether a matrix product has made a tensor, seen through views: its derivative reads the factors, and never the result."""
    node = value.grad_fn
    while node is not None and node.name() in VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node.name() in PRODUCTS


def decoder_inputs(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """What a sequence-to-sequence model's decoder reads: its labels, [B, L], moved right by one behind the token that its config starts
    with, as transformers' forward passes do with labels. By the model's own method where its class has one (Whisper's has not).
    """
    own: Callable[..., torch.Tensor] | None = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own(labels=labels)
    config: Any = model.config
    moved = torch.cat([torch.full_like(labels[:, :1], config.decoder_start_token_id), labels[:, :-1]], dim=1)
    return moved.masked_fill(moved == IGNORED_LABEL, config.pad_token_id)


def _number(value: torch.Tensor | int, device: torch.device) -> torch.Tensor:
    """0-d float64 on the device. A plain number is written by a kernel: copying it there would wait for the device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, torch.float64)
    return torch.full((), float(value), dtype=torch.float64, device=device)
