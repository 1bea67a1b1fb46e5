"""A small batch with values for a small model: by trial, since what a model takes (lengths, labels) only it knows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from colossal_core.example_batch import config_batch, taken_by
from colossal_core.specimen import SpecimenError
from colossal_core.task import config_facts, find_task

LENGTHS = (24, 16, 12, 8, 4)
"""Numbers of tokens to try, in this order. The first divides by 2, 3, 4 and 6."""

IGNORED_LABEL = -100


def small_batch(model: nn.Module) -> dict[str, Tensor]:
    """A batch of two sequences for a transformers model on the CPU, with labels where it takes them. Raises: SpecimenError."""
    error = "no batch is known for this class of model"
    for length in LENGTHS:
        shapes = config_batch(model, length)
        if shapes is None:
            break
        task = find_task(model)
        if task == "seq2seq-lm":
            shapes.pop("decoder_input_ids", None)
        batch = _with_values(shapes, model)
        try:
            return _with_labels(batch, model, task)
        except Exception as raised:  # whatever a stranger's forward raises: a shorter sequence may do
            error = f"it does not run on a batch made from its config ({type(raised).__name__}: {raised})"
    raise SpecimenError(error)


def example_values(example: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What the model takes of the user's example, on the CPU, in float32 where it is floating; values for what is on the meta device."""
    found = {}
    for key, tensor in taken_by(model, example).items():
        if tensor.is_meta:
            found.update(_with_values({key: tensor}, model))
        else:
            moved = tensor.detach().to("cpu")
            found[key] = moved.float() if moved.is_floating_point() else moved
    return found


def _with_values(shapes: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    allowed = _plain_tokens(model)
    found = {}
    for key, tensor in shapes.items():
        if tensor.is_floating_point():
            found[key] = torch.randn(tensor.shape, generator=generator)
        elif tensor.dtype == torch.bool:
            found[key] = torch.ones(tensor.shape, dtype=torch.bool)
        else:
            found[key] = allowed[torch.randint(len(allowed), tensor.shape, generator=generator)]
    return found


def _plain_tokens(model: nn.Module) -> Tensor:
    """Token numbers that mean nothing special (padding, a picture) to the model; 0 where it knows no tokens."""
    config = getattr(model, "config", None)
    vocab_size = config_facts(model).vocab_size or 1
    special = (
        set(_special_tokens(config.to_dict()))
        if config is not None and callable(getattr(config, "to_dict", None))
        else set()
    )
    return torch.tensor([token for token in range(vocab_size) if token not in special] or [0])


def _special_tokens(keys: Mapping[Any, Any]) -> list[int]:
    found = []
    for key, value in keys.items():
        if isinstance(value, Mapping):
            found += _special_tokens(value)
        elif "token_id" in str(key) or "token_index" in str(key):
            found += [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]
    return found


def _with_labels(batch: dict[str, Tensor], model: nn.Module, task: str) -> dict[str, Tensor]:
    """The batch with the labels that the model takes where a forward pass with them runs. Raises what the model raises without them."""
    if "labels" not in inspect.signature(model.forward).parameters:
        _run(model, batch)
        return batch
    tokens = batch.get("input_ids")
    if task != "own-loss":
        if tokens is None:  # speech: the labels are the text
            tokens = _with_values({"labels": torch.empty(2, LENGTHS[0], dtype=torch.long, device="meta")}, model)[
                "labels"
            ]
        labels = tokens.clone()
        labels[0, 3:5] = IGNORED_LABEL
        try:
            _run(model, {**batch, "labels": labels})
        except Exception:  # a loss that is never asked for (GIT's, without a picture): the logits are what counts
            _run(model, batch)
            return batch
        return {**batch, "labels": labels}
    outputs = _run(model, batch)
    found = _class_labels(getattr(outputs, "logits", None))
    if found is None:
        return batch
    try:
        _run(model, {**batch, "labels": found})
    except Exception:  # labels of another kind than classes: the outputs are all that is known
        return batch
    return {**batch, "labels": found}


def _class_labels(logits: object) -> Tensor | None:
    """Classes for logits [B, C] or [B, L, C]; a number for a sample where C is 1."""
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        return None
    if logits.shape[-1] == 1:
        return torch.linspace(-1.0, 1.0, logits.shape[0])
    return torch.arange(logits[..., 0].numel()).reshape(logits.shape[:-1]) % logits.shape[-1]


def _run(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return model(**batch)
