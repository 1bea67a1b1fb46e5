"""What `colossal verify` compares: the config's model, shrunk, on made-up batches. Builders are data: every rank repeats them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colossal_core.errors import ConfigError, Problem

if TYPE_CHECKING:
    import torch
    from torch import nn

    from colossal_core.testing.parity import RunSpec
    from colossal_launch.assembly import Setup

FUSED_DROPOUT_KEYS = (
    "attention_dropout",
    "attn_pdrop",
    "attn_dropout",
    "attention_probs_dropout_prob",
    "attention_dropout_prob",
)
"""Config keys of dropout inside attention, where a fused kernel draws the numbers: no key of ours reaches them."""

SEQUENCE_LENGTH = 16


@dataclass(frozen=True)
class ShrunkModel:
    """Builds the shrunk transformers model of a config, with real random weights. settings: the `model` section, as JSON. min_depth: layers
    that stay at least.
    """

    settings: str
    vocab_size: int
    min_depth: int = 0

    def config(self) -> Any:
        """The shrunk transformers config, and dropout inside attention turned off."""
        from colossal_core.config import ModelConfig
        from colossal_core.small_config import shrink_config
        from colossal_launch.models.architecture import make_config

        section = ModelConfig.model_validate_json(self.settings)
        if section.architecture is not None:
            full = make_config(section.architecture, section.config, vocab_size=self.vocab_size, eos_id=None)
        else:
            from transformers import AutoConfig

            full = AutoConfig.from_pretrained(str(section.pretrained), **section.config)
        small = shrink_config(full, section.verify_config, min_depth=self.min_depth)
        for key in FUSED_DROPOUT_KEYS:
            if getattr(small, key, 0.0):
                setattr(small, key, 0.0)
        return small

    def __call__(self) -> nn.Module:
        return self.build()[0]

    def build(self) -> tuple[nn.Module, tuple[str, ...]]:
        """The model, and what of its attention modules had a dropout that is now 0 (T5 has one config key for all dropouts)."""
        from colossal_core.quiet import quiet_transformers
        from colossal_launch.models.architecture import training_class

        small = self.config()
        with quiet_transformers():
            model: nn.Module = training_class(small)._from_config(small)  # type: ignore[attr-defined]
        return model, _without_attention_dropout(model)


def _without_attention_dropout(model: nn.Module) -> tuple[str, ...]:
    """Sets to 0 each probability that a module hands to its attention kernel; other dropouts of the model stay. Returns class.attribute."""
    from colossal_core.interfaces import ATTENTION_INTERFACE, modules_reaching

    found: dict[str, None] = {}
    for name in modules_reaching(model, ATTENTION_INTERFACE):
        module = model.get_submodule(name)
        for key, value in vars(module).items():
            if "drop" in key and isinstance(value, float) and value > 0.0:
                vars(module)[key] = 0.0
                found[f"{type(module).__name__}.{key}"] = None
    return tuple(found)


@dataclass(frozen=True)
class FactoryModel:
    """Builds the model of `model.factory` with its config and `verify_config`."""

    factory: str
    config: str

    def __call__(self) -> nn.Module:
        from colossal_launch.models.building import import_function

        model: nn.Module = import_function(self.factory, "model.factory")(**json.loads(self.config))
        return model


@dataclass(frozen=True)
class ExampleBatches:
    """Calls `model.example_batch` with a number of sequences, under a seed for each step."""

    function: str

    def __call__(self, step: int, num_sequences: int) -> Mapping[str, torch.Tensor]:
        import torch

        from colossal_launch.models.building import import_function

        torch.manual_seed(step)
        batch: Mapping[str, torch.Tensor] = import_function(self.function, "model.example_batch")(num_sequences)
        return batch


@dataclass(frozen=True)
class Verification:
    """A run to verify, and what the reader must know about it."""

    spec: RunSpec
    notes: tuple[str, ...]


def verification_of(setup: Setup) -> Verification:
    """The run that stands for a config: its model shrunk, three steps, float64. Raises ConfigError where no batch can be made."""
    from colossal_core.testing.models import TokenBatches
    from colossal_core.testing.parity import RunSpec

    section = setup.config.model
    if section is None:
        raise ConfigError([Problem("model", "is required", "add `model: {architecture: llama}`")])
    config = setup.config.model_dump(mode="json", exclude_unset=True, exclude={"model", "data", "checkpoint", "train"})
    if section.factory is not None:
        if section.example_batch is None:
            reason = "is needed to verify a factory's model"
            remedy = "name a function of (num_sequences) that returns a batch: `my_pkg:batch`"
            raise ConfigError([Problem("model.example_batch", reason, remedy)])
        merged = {**section.config, **(section.verify_config or {})}
        model: Any = FactoryModel(section.factory, json.dumps(merged))
        notes = [] if section.verify_config else ["the model runs unshrunk: model.verify_config can make it smaller"]
        spec = RunSpec(config, model, ExampleBatches(section.example_batch), loss_fn=section.loss)
        return Verification(spec, (*notes, *_unkeyed_notes(model())))
    size = 257 if setup.config.data is not None and setup.config.data.tokenizer == "bytes" else 4096
    stages = setup.plugins.axis_sizes(setup.config).get("pp", 1)
    min_depth = 2 * stages if stages > 1 else 0  # two stages on each rank, as some schedules have them
    shrunk = ShrunkModel(section.model_dump_json(exclude_unset=True), size, min_depth)
    small = shrunk.config()
    text = small.get_text_config()
    vocab_size = getattr(text, "vocab_size", None)
    if vocab_size is None:
        reason = f"verify makes batches of tokens, and {small.model_type} takes none"
        raise ConfigError(
            [
                Problem(
                    "model.architecture", reason, "wrap it as model.factory with model.example_batch", small.model_type
                )
            ]
        )
    spec = RunSpec(config, shrunk, TokenBatches(vocab_size, SEQUENCE_LENGTH), loss_fn=section.loss)
    return Verification(spec, tuple(_notes(shrunk, small)))


def _notes(shrunk: ShrunkModel, small: Any) -> list[str]:
    module, silenced = shrunk.build()
    count = sum(parameter.numel() for parameter in module.parameters())
    notes = [f"{type(module).__name__}, shrunk to {count:,} parameters"]
    from colossal_core.config import ModelConfig

    section = ModelConfig.model_validate_json(shrunk.settings)
    asked = {**(type(small)().to_dict()), **section.config}
    off = [key for key in FUSED_DROPOUT_KEYS if isinstance(asked.get(key), float) and asked[key] > 0]
    if off or silenced:
        why = "a fused attention kernel draws its numbers by microbatch, not by sample"
        notes.append(f"{', '.join([*off, *silenced])} is compared at 0: {why}")
    return [*notes, *_unkeyed_notes(module)]


def _unkeyed_notes(model: nn.Module) -> list[str]:
    """What draws by microbatch is named: a difference may come from there."""
    from colossal_core.keyed_dropout import install_keyed_dropout

    unkeyed = install_keyed_dropout(model).unkeyed
    return [f"draws random numbers by microbatch, not by sample: {'; '.join(unkeyed)}"] if unkeyed else []
