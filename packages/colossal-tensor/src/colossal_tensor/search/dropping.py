"""The small model with its dropouts on: whether a plan drops, on every rank, what one process drops.

Dropouts of modules and of methods draw keyed numbers, as in training. Probabilities that go to an attention kernel stay 0: there no rank
draws the numbers of one process, and none is expected to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from colossal_core.float64 import Float64Throughout
from colossal_core.functional_dropout import keyed_methods
from colossal_core.interfaces import ATTENTION_INTERFACE, calls_fused_attention, modules_reaching
from colossal_core.specimen_trial import batch_for, configs_in, prepared
from colossal_tensor.search.proof import Proof

if TYPE_CHECKING:
    from colossal_core.specimen import Specimen
    from colossal_tensor.search.laboratory import Laboratory

PROBABILITY = 0.2
"""Of every dropout that the model is configured to have."""


def dropping_proof(specimen: Specimen, lab: Laboratory) -> Proof | None:
    """The proof in which the small model drops; None where it has no dropout but in attention kernels."""
    with Float64Throughout():
        configured, model = specimen.build(), prepared(specimen.build())
    if not _turned_on(model, configured, lab):
        return None
    batch = batch_for(model, specimen.batch(), lab.anatomy)
    return Proof(model, lab.anatomy, batch, lab.setting.names, dropping=True)


def _turned_on(model: nn.Module, configured: nn.Module, lab: Laboratory) -> bool:
    """Whether there was a probability to set, in the modules or in the configs that they read."""
    reaching = set(modules_reaching(model, ATTENTION_INTERFACE))
    modules, any_set = dict(model.named_modules()), False
    for name, source in configured.named_modules():
        target = modules[name]
        attends = name in reaching or calls_fused_attention(type(source))
        kernel_alone = attends and not keyed_methods(type(source)).copies
        # A dropout module that is never called holds a probability for a kernel.
        if not kernel_alone and not (isinstance(source, nn.Dropout) and name not in lab.setting.trace.calls):
            any_set |= _set(target.__dict__, source.__dict__, attends=attends)
        for part, given in zip(
            configs_in(vars(target).get("config")), configs_in(vars(source).get("config")), strict=True
        ):
            any_set |= _set(vars(part), vars(given), attends=True)
    return any_set


def _set(attributes: dict[str, Any], configured: Mapping[str, Any], *, attends: bool) -> bool:
    found = [
        key
        for key, value in configured.items()
        if isinstance(value, float) and value > 0.0 and _is_probability(key, configured, attends=attends)
    ]
    attributes.update(dict.fromkeys(found, PROBABILITY))
    return bool(found)


def _is_probability(key: str, attributes: Mapping[str, Any], *, attends: bool) -> bool:
    """Of elements: not of whole layers or samples, and not, where attention is made, what is named after it."""
    if key == "p" and "inplace" in attributes:
        return True
    return "drop" in key and not any(word in key for word in ("layer", "path", *(("att",) if attends else ())))
