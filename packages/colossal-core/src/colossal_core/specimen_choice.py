"""Which specimen a model gets by rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from colossal_core.adapters import adapters_of
from colossal_core.anatomy import BlockChain
from colossal_core.config_specimen import ConfigSpecimen, classes_of, takes_only_config
from colossal_core.module_specimen import ModuleSpecimen
from colossal_core.specimen import Specimen, patterns_of
from colossal_core.transformers_plans import is_transformers_model


def specimen_of(
    model: nn.Module, chains: Sequence[BlockChain], example_batch: Mapping[str, Tensor] | None
) -> Specimen | None:
    """The specimen of a model by rule; None where no batch is known for it. The model is looked at, and copied when one is built."""
    adapters = adapters_of(model)
    base = adapters.base if adapters is not None else model
    whole = ModuleSpecimen(model, tuple(chains), example_batch)
    if is_transformers_model(base) and takes_only_config(type(base)):
        names = patterns_of(name for name, _ in model.named_parameters(remove_duplicate=False))
        return ConfigSpecimen(type(base), base.config, names, classes_of(model), adapters, whole)
    return whole if example_batch is not None or is_transformers_model(model) else None
