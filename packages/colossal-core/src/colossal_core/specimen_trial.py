"""Making a small model ready to prove something on it, whoever proves: float64, no dropout, no value zero by chance."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from colossal_core.loss import decoder_inputs

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy

_SPREAD = 0.05


def prepared(model: nn.Module) -> nn.Module:
    """A small model as proofs need it: float64, in training mode (some models then call other code) without dropout, every parameter away
    from zero and one.
    """
    generator = torch.Generator().manual_seed(20_230_501)
    model = model.double().train()
    for module in model.modules():
        _without_dropout(vars(module))
        for part in configs_in(vars(module).get("config")):
            _without_dropout(vars(part))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(parameter + _SPREAD * noise)
    return model


def _without_dropout(attributes: dict[str, Any]) -> None:
    """Sets every probability of dropping to 0: floats by the name, and `p` of torch's modules."""
    for key, value in attributes.items():
        if isinstance(value, float) and ("drop" in key or (key == "p" and "inplace" in attributes)):
            attributes[key] = 0.0


def configs_in(config: Any) -> list[Any]:
    """A transformers config and those inside it."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [] if config is None else [config, *(found for part in inner for found in configs_in(part))]


def batch_for(model: nn.Module, batch: Mapping[str, Any], anatomy: ModelAnatomy) -> dict[str, Any]:
    """The specimen's batch as core calls the model for its logits: without labels where it can do without, floats in float64."""
    given: dict[str, Any] = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in batch.items()
    }
    labels = inspect.signature(model.forward).parameters.get("labels")
    if labels is not None and labels.default is not inspect.Parameter.empty:
        found = given.pop("labels", None)
        if anatomy.task == "seq2seq-lm" and "decoder_input_ids" not in given and found is not None:
            given["decoder_input_ids"] = decoder_inputs(model, found)
    if "use_cache" in (anatomy.forward_keys or ()):
        given["use_cache"] = False
    return given
