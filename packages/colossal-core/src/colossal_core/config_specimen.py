"""The specimen of a transformers model: the same class with the sizes of its config reduced."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from colossal_core.adapters import Adapters
from colossal_core.module_specimen import ModuleSpecimen, refuse_own_forwards, seeded
from colossal_core.quiet import quiet_transformers
from colossal_core.small_config import shrink_config
from colossal_core.specimen import SpecimenError, pattern_of, patterns_of
from colossal_core.specimen_batch import small_batch

_NO_STRUCTURE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")
"""Keys of a config that change nothing about what is computed with given values."""

_MOST_KINDS = 32
"""Small models in one process of which strategies' answers are kept."""

_KEPT_ATTENTION = ("eager", "sdpa")
_KEPT_EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""Implementations that run on the CPU in float64; instead of any other a model takes its default."""


def takes_only_config(kind: type[nn.Module]) -> bool:
    """Whether a class is made from a config and nothing else, as transformers' own are."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[2:]
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not inspect.Parameter.empty or p.kind in free for p in parameters)


@dataclass(frozen=True)
class ConfigSpecimen:
    """model_class, config: of the model, or of what adapters are on. names: patterns of the real model's parameters, with `*` for numbers;
    classes: patterns of its modules, each with its class. whole: the specimen that stands in where no small model can be built, or where
    parameters or modules are missing in it: the model was changed after it was made from its config. The small model may have some that the
    real one has not (a kind of layer that its config allows).
    """

    model_class: type[nn.Module]
    config: Any
    names: frozenset[str]
    classes: frozenset[tuple[str, str]]
    adapters: Adapters | None
    whole: ModuleSpecimen

    @cached_property
    def key(self) -> str:
        if self._stand_in is not None:
            return self._stand_in.key
        keys = {key: value for key, value in self._small.to_dict().items() if key not in _NO_STRUCTURE}
        name = f"{self.model_class.__module__}.{self.model_class.__qualname__}"
        adapters = self.adapters.described() if self.adapters is not None else {}
        parts = [name, keys, adapters, self._implementations]
        text = json.dumps(parts, sort_keys=True, default=_plain)
        return f"{name}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @cached_property
    def answers(self) -> dict[object, object]:
        kind: Any = self.model_class
        return self._stand_in.answers if self._stand_in is not None else _answers_of(kind, self.key)

    def build(self) -> nn.Module:
        return self._stand_in.build() if self._stand_in is not None else self._built()

    def batch(self) -> Mapping[str, Tensor]:
        return dict(self._batch)

    @cached_property
    def _batch(self) -> Mapping[str, Tensor]:
        if self._stand_in is not None:
            return self._stand_in.batch()
        model = self._built(with_adapters=False)
        with quiet_transformers():
            return small_batch(model)

    @cached_property
    def _small(self) -> Any:
        with quiet_transformers():
            small = shrink_config(self.config)
        if small.is_encoder_decoder and getattr(small, "decoder_start_token_id", None) is None:
            small.decoder_start_token_id = getattr(small, "pad_token_id", None) or 0
        for part in {id(part): part for part in (small, small.get_text_config())}.values():
            if getattr(part, "use_cache", False):
                part.use_cache = False
        return small

    @cached_property
    def _implementations(self) -> dict[str, str]:
        attention = getattr(self.config, "_attn_implementation", None)
        experts = getattr(self.config, "_experts_implementation", None)
        found = {"attn_implementation": attention} if attention in _KEPT_ATTENTION else {}
        return {**found, "experts_implementation": experts} if experts in _KEPT_EXPERTS else found

    @cached_property
    def _stand_in(self) -> ModuleSpecimen | None:
        refuse_own_forwards(self.whole.model)
        try:
            built = self._built()
        except Exception as error:  # whatever transformers raises on sizes that do not go together
            reason = f"a small model of its config cannot be built ({type(error).__name__}: {error})"
        else:
            missing = sorted(
                self.names - patterns_of(name for name, _ in built.named_parameters(remove_duplicate=False))
            )
            others = sorted(self.classes - classes_of(built))
            if not missing and not others:
                return None
            reason = f"the small model of its config has none of its parameters {', '.join(missing[:3])}"
            if not missing:
                name, kind = others[0]
                reason = f"in the small model of its config {name} is no {kind.rpartition('.')[2]}"
        try:
            self.whole.key  # noqa: B018 - says whether it can be copied at all
        except SpecimenError as error:
            raise SpecimenError(f"{reason}, and {error}") from None
        return self.whole

    def _built(self, *, with_adapters: bool = True) -> nn.Module:
        with quiet_transformers(), seeded():
            make: Any = self.model_class
            model: nn.Module = make._from_config(
                copy.deepcopy(self._small), dtype=torch.float32, **self._implementations
            )
            if self.adapters is not None and with_adapters:
                model = self.adapters.put_on(model)
        return model.train()


def classes_of(model: nn.Module) -> frozenset[tuple[str, str]]:
    """The pattern of each module's name with the name of its class."""
    return frozenset(
        (pattern_of(name), f"{type(module).__module__}.{type(module).__qualname__}")
        for name, module in model.named_modules(remove_duplicate=False)
    )


@lru_cache(maxsize=_MOST_KINDS)
def _answers_of(model_class: type[nn.Module], key: str) -> dict[object, object]:
    """One for all specimens of a class that build the same small model: their key says everything that it is made from."""
    del model_class, key
    return {}


def _plain(value: object) -> object:
    """What JSON has no word for; never an address, nor a set in an order of its own."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return str(value) if isinstance(value, torch.dtype | torch.device) else type(value).__qualname__
