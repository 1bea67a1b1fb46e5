"""A small batch that a transformers model of any kind accepts, made from its config, for a forward pass on the meta device."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from colossal_core.transformers_plans import is_transformers_model

NUM_SEQUENCES = 2
NUM_TOKENS = 8
NUM_SAMPLES = 16_000  # of sound: one second at the usual rate, long enough for every convolutional front end


def traced_batch(model: nn.Module, example_batch: Mapping[str, Tensor] | None) -> dict[str, object] | None:
    """What to trace with: the user's example, or one made from a transformers config; only keys that `forward` takes; None: unknown.

    Labels are left out where they may be, and so is a router's balance loss: the blocks do not need them, and a loss may look at values,
    which meta tensors have not.
    """
    batch = example_batch if example_batch is not None else config_batch(model)
    if batch is None:
        return None
    taken = inspect.signature(model.forward).parameters
    kept: dict[str, object] = {key: _as_parameters(value, model) for key, value in taken_by(model, batch).items()}
    if "labels" in taken and taken["labels"].default is not inspect.Parameter.empty:
        labels = kept.pop("labels", None)
        if isinstance(labels, Tensor) and "decoder_input_ids" in taken and "decoder_input_ids" not in kept:
            kept["decoder_input_ids"] = torch.zeros_like(labels)  # as training makes them from the labels
    if is_transformers_model(model):
        kept.update({switch: False for switch in ("use_cache", "output_router_logits") if switch in taken})
    return kept


def _as_parameters(value: Tensor, model: nn.Module) -> Tensor:
    """A floating input in the dtype of the model's parameters, as training hands it over; a sound file's or a picture's may be another."""
    floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    dtype = next(floating, value.dtype)
    return (
        torch.empty_like(value, dtype=dtype, device="meta")
        if value.is_floating_point() and value.dtype != dtype
        else value
    )


def taken_by(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries that `forward` takes: a batch to train on may hold more (labels for a loss of the user's)."""
    taken = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    return {key: value for key, value in batch.items() if takes_any or key in taken}


def config_batch(model: nn.Module, num_tokens: int = NUM_TOKENS) -> dict[str, Tensor] | None:
    """Inputs that a transformers model takes, on the meta device, of two sequences; None for any other model. No labels."""
    config = getattr(model, "config", None)
    if config is None or not is_transformers_model(model):
        return None
    taken = inspect.signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", "input_ids"))
    makers = {"pixel_values": _pixels, "input_features": _spectrogram, "input_values": _sound}
    if main in makers:
        batch = {main: makers[main](config)}
        if "input_ids" in taken and not getattr(config, "is_encoder_decoder", False):
            batch["input_ids"] = _tokens(num_tokens)
    else:
        batch = {"input_ids": _tokens(num_tokens)}
        if "pixel_values" in taken and model.get_output_embeddings() is None:  # type: ignore[operator]
            batch["pixel_values"] = _pixels(config)  # a model of both (CLIP); one that writes text runs on text alone
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        batch["decoder_input_ids"] = _tokens(num_tokens)
    return batch


def _tokens(num_tokens: int) -> Tensor:
    return torch.zeros(NUM_SEQUENCES, num_tokens, dtype=torch.long, device="meta")


def _pixels(config: object) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)
    return torch.zeros(NUM_SEQUENCES, getattr(vision, "num_channels", 3), height, width, device="meta")


def _spectrogram(config: object) -> Tensor:
    num_frames = 2 * int(getattr(config, "max_source_positions", 1500))
    return torch.zeros(NUM_SEQUENCES, int(getattr(config, "num_mel_bins", 80)), num_frames, device="meta")


def _sound(config: object) -> Tensor:
    return torch.zeros(NUM_SEQUENCES, NUM_SAMPLES, device="meta")
