"""The specimen of a model of the user's own: what its factory makes with the small sizes that `model.verify_config` names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from colossal_core.errors import ColossalError
from colossal_core.module_specimen import seeded
from colossal_core.specimen import SpecimenError
from colossal_core.specimen_batch import example_values
from colossal_launch.models.building import import_function


@dataclass(frozen=True)
class FactorySpecimen:
    """factory: `package.module:function`. config: its arguments, small sizes included. example: `model.example_batch` of two sequences."""

    factory: str
    config: Mapping[str, Any]
    example: Mapping[str, Tensor]

    @property
    def key(self) -> str:
        shapes = sorted(f"{key} {tuple(value.shape)} {value.dtype}" for key, value in self.example.items())
        text = json.dumps([self.config, shapes], sort_keys=True)
        return f"{self.factory}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @cached_property
    def answers(self) -> dict[object, object]:
        return {}

    def build(self) -> nn.Module:
        try:
            with seeded():
                model: nn.Module = import_function(self.factory, "model.factory")(**self.config)
        except ColossalError:
            raise
        except Exception as error:  # whatever the user's function raises on these sizes
            text = f"{self.factory} makes no model with model.verify_config ({type(error).__name__}: {error})"
            raise SpecimenError(text) from error
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise SpecimenError(
                f"{self.factory} makes a model without values: build it on the CPU where sizes are small"
            )
        return model.float().train()

    def batch(self) -> Mapping[str, Tensor]:
        return example_values(self.example, self.build())
