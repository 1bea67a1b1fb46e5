"""Models of transformers as small ones that any process can build, and batches for them: what the table of architectures trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

Head = Literal["causal-lm", "masked-lm", "image-classification", "seq2seq-lm", "speech-to-text"]
"""What a model is for. An architecture may have a class for several."""

_MAPPINGS: Mapping[Head, str] = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "speech-to-text": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
}
_CACHED_EXAMPLES = 4


def causal_architectures() -> tuple[str, ...]:
    """The model types that the installed transformers has a causal language model for, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


@dataclass(frozen=True)
class SmallModel:
    """Builds the model of an architecture with one of its heads, shrunk. As causal language models, encoders (BERT) are built as decoders
    and decoders of encoder-decoders (BART) alone. Every dropout is 0: what draws numbers is proven elsewhere, one kind at a time.
    """

    architecture: str
    head: Head = "causal-lm"

    def config(self) -> Any:
        """The small config that the model class takes: that of its text part where the architecture has several."""
        return self._parts()[1]

    def __call__(self) -> nn.Module:
        from colossal_core.quiet import quiet_transformers

        model_class, config = self._parts()
        with quiet_transformers():
            model: nn.Module = model_class._from_config(config)
        return model

    def _parts(self) -> tuple[Any, Any]:
        from transformers.models.auto import modeling_auto

        from colossal_core.quiet import quiet_transformers
        from colossal_core.small_config import shrink_config
        from colossal_launch.models.architecture import config_class, known_keys

        config_type = config_class(self.architecture)
        alone = self.head == "causal-lm" and "is_decoder" in known_keys(config_type)
        with quiet_transformers():
            small = shrink_config(config_type(**({"is_decoder": True} if alone else {})))
        found: Any = getattr(modeling_auto, _MAPPINGS[self.head])[config_type]
        model_class = found[0] if isinstance(found, tuple) else found
        config = _config_for(small, model_class.config_class)
        if self.head == "seq2seq-lm" and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = config.pad_token_id or 0
        for part in _with_parts(config):
            _turn_off(part)
        return model_class, config


@dataclass(frozen=True)
class SmallBatches:
    """Batches for a small model of any head, made from the one that its specimen runs on: each sequence or picture of a step is one of the
    specimen's, moved along its last dimension by a distance of its own; so are its labels. A builder for `RunSpec.batch`.
    """

    model: SmallModel

    def __call__(self, step: int, num_sequences: int) -> Mapping[str, torch.Tensor]:
        import torch

        example = _example(self.model)
        return {
            key: torch.stack([_moved(value, row, 5 * step + row) for row in range(num_sequences)])
            for key, value in example.items()
        }


@lru_cache(maxsize=_CACHED_EXAMPLES)
def _example(model: SmallModel) -> Mapping[str, torch.Tensor]:
    from colossal_core.examine import examine

    specimen = examine(model()).specimen
    assert specimen is not None, f"{model} is one of transformers, and has a specimen"
    return specimen.batch()


def _moved(value: torch.Tensor, row: int, distance: int) -> torch.Tensor:
    """One sample of a batch, rolled. A batch of one number a sample has nothing to roll: the next sample's number is taken."""
    if value.dim() == 1:
        return value[distance % len(value)]
    return value[row % len(value)].roll(distance, dims=-1)


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
