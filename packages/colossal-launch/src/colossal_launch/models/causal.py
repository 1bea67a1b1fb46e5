"""Every causal language model of transformers as a small one that any process can build: what the table of architectures trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def causal_architectures() -> tuple[str, ...]:
    """The model types that the installed transformers has a causal language model for, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


@dataclass(frozen=True)
class SmallCausalModel:
    """Builds the causal language model of an architecture, shrunk. Encoders (BERT) are built as decoders, decoders of encoder-decoders
    (BART) alone. Every dropout is 0: what draws numbers is proven elsewhere, one kind of dropout at a time.
    """

    architecture: str

    def config(self) -> Any:
        """The small config that the model class takes: that of its text part where the architecture has several."""
        return self._parts()[1]

    def __call__(self) -> nn.Module:
        from colossal_launch.models.architecture import quiet_transformers

        model_class, config = self._parts()
        with quiet_transformers():
            model: nn.Module = model_class._from_config(config)
        return model

    def _parts(self) -> tuple[Any, Any]:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        from colossal_launch.models.architecture import config_class, known_keys, quiet_transformers
        from colossal_launch.models.shrink import shrink_config

        config_type = config_class(self.architecture)
        asked = {"is_decoder": True} if "is_decoder" in known_keys(config_type) else {}
        with quiet_transformers():
            small = shrink_config(config_type(**asked))
        found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_type]
        model_class = found[0] if isinstance(found, tuple) else found
        config = _config_for(small, model_class.config_class)
        for part in _with_parts(config):
            _turn_off(part)
        return model_class, config


def _config_for(config: Any, wanted: type) -> Any:
    """That part of the config which the model class takes, else the config itself (one model type may borrow another's class)."""
    return next((part for part in _with_parts(config) if isinstance(part, wanted)), config)


def _with_parts(config: Any) -> list[Any]:
    """A config and the configs inside it, outermost first."""
    found = [config]
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            found += _with_parts(part)
    return found


def _turn_off(config: Any) -> None:
    """Sets every probability of dropping to 0, and the cache of keys and values off: in training nothing reads it."""
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    if getattr(config, "use_cache", False):
        config.use_cache = False
