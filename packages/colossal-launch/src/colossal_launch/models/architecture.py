"""transformers' architectures by name: the config from the user's keys, every mistake found, and the class that trains it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from colossal_core.errors import ConfigError, Problem
from colossal_core.quiet import quiet_transformers

_ALWAYS_KNOWN = frozenset(
    {
        "attn_implementation",
        "experts_implementation",
        "tie_word_embeddings",
        "is_decoder",
        "decoder_start_token_id",
        "pad_token_id",
    }
)
_OLDER_NAMES = {"rope_theta": "rope_parameters", "rope_scaling": "rope_parameters"}
"""Keys of older configs that transformers still turns into newer ones, by the newer one."""

_REMEDY_INSTALL = "pip install 'colossal-launch[hf]', or name a model of your own by model.factory"


def import_transformers(field: str, value: str) -> Any:
    """The transformers package, or the ConfigError that says how to get it."""
    try:
        import transformers
    except ImportError:
        reason = "needs the package transformers, which is not installed"
        raise ConfigError([Problem(field, reason, _REMEDY_INSTALL, value)]) from None
    return transformers


def config_class(architecture: str) -> Any:
    """The config class of an architecture. Raises ConfigError with the closest names where there is none."""
    import_transformers("model.architecture", architecture)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = list(CONFIG_MAPPING.keys())
    if architecture not in names:
        close = difflib.get_close_matches(architecture, names, n=3, cutoff=0.5)
        remedy = (
            f"did you mean {' or '.join(close)}?" if close else "give a model type of transformers (llama, gpt2, qwen3)"
        )
        reason = f"the installed transformers has no such architecture (it has {len(names)})"
        raise ConfigError([Problem("model.architecture", reason, remedy, architecture)])
    return CONFIG_MAPPING[architecture]


def known_keys(config_type: Any) -> tuple[str, ...]:
    """The keys that a config class reads, sorted: transformers itself takes any key and says nothing."""
    named = {
        name
        for name, parameter in inspect.signature(config_type.__init__).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "self"
    }
    older = {old for old, new in _OLDER_NAMES.items() if new in named}
    return tuple(sorted(named | set(config_type.attribute_map) | older))


def make_config(architecture: str, keys: Mapping[str, Any], *, vocab_size: int | None, eos_id: int | None) -> Any:
    """The config of an architecture from the user's keys, and from the tokenizer where the user says nothing.

    vocab_size, eos_id: the tokenizer's; None where the data is no text. Raises ConfigError with every problem of `model.config`.
    """
    config_type = config_class(architecture)
    problems = _unknown_keys(architecture, keys, known_keys(config_type))
    if problems:
        raise ConfigError(problems)
    chosen = {**_from_tokenizer(config_type, keys, vocab_size, eos_id), **keys}
    try:
        with quiet_transformers():
            config = config_type(**chosen)
    except Exception as error:
        raise ConfigError([_refused(error, chosen)]) from None
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id or 0  # T5's own convention, kept in its checkpoints only
    problems = _size_problems(config, keys, vocab_size)
    if problems:
        raise ConfigError(problems)
    return config


def _unknown_keys(architecture: str, keys: Mapping[str, Any], known: Sequence[str]) -> list[Problem]:
    problems = []
    for key in keys:
        if key not in known and key not in _ALWAYS_KNOWN:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            remedy = f"{hint}{architecture} takes {', '.join(known)}"
            problems.append(Problem(f"model.config.{key}", "unknown key", remedy, keys[key]))
    return problems


def _from_tokenizer(
    config_type: Any, keys: Mapping[str, Any], vocab_size: int | None, eos_id: int | None
) -> dict[str, Any]:
    """What the tokenizer decides. No padding token: an embedding never learns that row, and here it would be a word."""
    known = known_keys(config_type)
    found: dict[str, Any] = {}
    if vocab_size is not None and "vocab_size" in known:
        found["vocab_size"] = vocab_size
        if not getattr(config_type, "is_encoder_decoder", False):
            found["pad_token_id"] = None
    if eos_id is not None:
        found.update({key: eos_id for key in ("bos_token_id", "eos_token_id") if key in known})
    return {key: value for key, value in found.items() if key not in keys}


def _refused(error: Exception, chosen: Mapping[str, Any]) -> Problem:
    """transformers' own complaint, with the key that it is about where it names one."""
    text = " ".join(str(error).split()).replace("TypeError: ", "")
    named = [key for key in chosen if f"'{key}'" in text]
    if len(named) == 1:
        return Problem(f"model.config.{named[0]}", text, "give a value of the type that is named", chosen[named[0]])
    return Problem("model.config", f"transformers refuses it ({text})", "change the sizes that are named")


def _size_problems(config: Any, keys: Mapping[str, Any], vocab_size: int | None) -> list[Problem]:
    """Sizes that do not divide, and a vocabulary smaller than the tokenizer's."""
    problems = []
    text = config.get_text_config()

    def size(name: str) -> int | None:
        try:
            value = getattr(text, name, None)
        except RuntimeError:  # transformers' answer where layers have sizes of their own
            return None
        return value if isinstance(value, int) and value > 0 else None

    def written(name: str) -> str:
        return text.attribute_map.get(name, name) if name not in keys else name

    hidden, heads, groups = size("hidden_size"), size("num_attention_heads"), size("num_key_value_heads")
    named = {written("hidden_size"), written("num_attention_heads"), "hidden_size", "num_attention_heads"} & set(keys)
    own_width = any(isinstance(getattr(type(text), key, None), int) for key in ("head_dim", "qk_nope_head_dim"))
    if hidden and heads and hidden % heads and named and not own_width and "head_dim" not in keys:
        reason = f"{heads} attention heads do not divide it"
        problems.append(Problem(f"model.config.{written('hidden_size')}", reason, f"use a multiple of {heads}", hidden))
    if heads and groups and heads % groups:
        reason = f"it does not divide the {heads} attention heads"
        problems.append(Problem("model.config.num_key_value_heads", reason, f"use a divisor of {heads}", groups))
    if vocab_size is not None and size("vocab_size") is not None and config.get_text_config().vocab_size < vocab_size:
        reason = f"the tokenizer has {vocab_size} entries"
        remedy = "leave it out, or use at least as many"
        problems.append(Problem("model.config.vocab_size", reason, remedy, text.vocab_size))
    return problems


def training_class(config: Any) -> type[nn.Module]:
    """The class that trains a config: encoder-decoder, masked or causal language model, or image classifier.

    An encoder that could also decode (BERT) is a masked model, unless its config says `is_decoder`.
    """
    from transformers.models.auto import modeling_auto

    sequence_to_sequence = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    images = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    order = [causal, masked, sequence_to_sequence, images]
    if getattr(config, "is_encoder_decoder", False):
        order = [sequence_to_sequence, causal, masked, images]
    elif not getattr(config, "is_decoder", False) and type(config) in masked:
        order = [masked, causal, sequence_to_sequence, images]
    for mapping in order:
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            cls: type[nn.Module] = found[0] if isinstance(found, tuple) else found
            return cls
    reason = "transformers has no language model and no image classifier of this architecture"
    remedy = "name a model of your own by model.factory"
    raise ConfigError([Problem("model.architecture", reason, remedy, config.model_type)])
