"""The small model on which plans are tried, with everything that is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from colossal_core.examine import examine
from colossal_core.float64 import Float64Throughout
from colossal_core.specimen import SpecimenError
from colossal_core.specimen_trial import batch_for, prepared
from colossal_tensor.search.borders import Setting
from colossal_tensor.search.proof import Proof
from colossal_tensor.search.sites import names_of
from colossal_tensor.search.trace import trace_model

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.specimen import Specimen


@dataclass(frozen=True)
class Laboratory:
    """anatomy: of the small model. proof: what plans are tried in. weights: of all matrix products, in order of execution. vocabulary:
    those of the embeddings and the head.
    """

    anatomy: ModelAnatomy
    setting: Setting
    proof: Proof
    weights: tuple[str, ...]
    vocabulary: frozenset[str]

    @property
    def block_prefixes(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name in self.anatomy.blocks)

    def is_before_blocks(self, weight: str) -> bool:
        """Whether a product stands before the first block."""
        first = min((self.setting.trace.calls.get(name, 0) for name in self.anatomy.blocks), default=0)
        return self.setting.trace.calls.get(weight.rpartition(".")[0], first) < first


def laboratory(specimen: Specimen) -> Laboratory:
    """Builds the small model twice, one to be watched and one to be cut, and runs both once.

    Raises: SpecimenError where it cannot be built, or does not run.
    """
    with Float64Throughout():
        watched, model = prepared(specimen.build()), prepared(specimen.build())
    anatomy = examine(model)
    batch = batch_for(model, specimen.batch(), anatomy)
    try:
        with torch.enable_grad(), Float64Throughout():
            trace = trace_model(watched, batch, anatomy.blocks)
    except Exception as error:  # whatever a stranger's forward raises
        raise SpecimenError(f"it does not run ({type(error).__name__}: {error})") from error
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
    numbers = {(fact.name, name): value for fact in anatomy.modules for name, value in fact.numbers}
    setting = Setting(model, trace, names_of(model, anatomy.blocks), anatomy.blocks, numbers, shapes)
    ends = {f"{module}.weight" for module in (*anatomy.heads, *anatomy.embeddings)}
    vocabulary = {alias for fact in anatomy.parameters if ends & set(fact.names) for alias in fact.names}
    weights = tuple(dict.fromkeys(product.label for product in trace.products))
    return Laboratory(anatomy, setting, Proof(model, anatomy, batch, setting.names), weights, frozenset(vocabulary))
