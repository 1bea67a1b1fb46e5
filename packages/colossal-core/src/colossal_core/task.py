"""What a model is trained for, read off its class and config: the loss that core owns, and the numbers that plans need."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from colossal_core.anatomy import Task
from colossal_core.transformers_plans import is_transformers_model

_CAUSAL = ("ForCausalLM", "LMHeadModel", "WithLMHead")
_MAPPINGS: Mapping[str, Task] = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "causal-lm",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "masked-lm",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "seq2seq-lm",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "seq2seq-lm",
}


@dataclass(frozen=True)
class ConfigFacts:
    """Numbers of a transformers-like config; None where it has none, or another for some layers."""

    vocab_size: int | None
    hidden_size: int | None
    num_heads: int | None
    num_key_value_heads: int | None
    num_layers: int | None
    auxiliary_loss: bool


def find_task(model: nn.Module) -> Task:
    """The task of the class or of the nearest parent that transformers knows; `own-loss` for any other model."""
    if not is_transformers_model(model):
        return "own-loss"
    for parent in type(model).__mro__:
        name = parent.__name__
        if name.endswith("ForMaskedLM"):
            return "masked-lm"
        if name.endswith(_CAUSAL):
            return "causal-lm"
        if name.endswith("ForConditionalGeneration") and _has_output_embeddings(model):
            return "seq2seq-lm" if getattr(model.config, "is_encoder_decoder", False) else "causal-lm"
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    names = {parent.__name__ for parent in type(model).__mro__}
    for mapping, task in _MAPPINGS.items():
        if names.intersection(map(str, getattr(auto, mapping, {}).values())):
            return task
    return "own-loss"


def config_facts(model: nn.Module) -> ConfigFacts:
    """Reads `model.config`, or its text part where the model has several."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    text = get_text_config() if callable(get_text_config) else config
    num_heads = _number(text, "num_attention_heads", "n_head", "num_heads")
    groups = _number(text, "num_key_value_heads", "num_kv_heads", "n_head_kv")
    if getattr(text, "multi_query", False) is True and not getattr(text, "new_decoder_architecture", False):
        groups = 1
    return ConfigFacts(
        vocab_size=_number(text, "vocab_size"),
        hidden_size=_number(text, "hidden_size", "d_model", "n_embd"),
        num_heads=num_heads,
        num_key_value_heads=num_heads if groups is None else groups,
        num_layers=_number(text, "num_hidden_layers", "n_layer", "num_layers"),
        auxiliary_loss=any(getattr(part, "output_router_logits", False) is True for part in (config, text)),
    )


def _has_output_embeddings(model: nn.Module) -> bool:
    get = getattr(model, "get_output_embeddings", None)
    return callable(get) and get() is not None


def _number(config: object, *names: str) -> int | None:
    """The first of `names` that the config has as an integer, the same for every layer."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:
            # transformers' answer where layers have numbers of their own (Dots 3 has fewer heads in some)
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
