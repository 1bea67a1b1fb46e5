"""A small model of the same kind as the one in training: what a strategy tries its plan on, on the CPU, before it trusts it.

A transformers model has one by its config with its sizes reduced (`ConfigSpecimen`), adapters of PEFT included. Any other model has its own
blocks, two of each kind, in their real sizes (`ModuleSpecimen`); that needs an example batch. Nothing is built before it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from colossal_core.errors import ColossalError

if TYPE_CHECKING:
    from torch import Tensor, nn


class Specimen(Protocol):
    """key: equal for equal structure, in any process; a cache may go by it. Building draws from a random state of its own: the same values
    each time, the caller's is left alone. Not for two threads at once. Raises: SpecimenError from all three.
    """

    @property
    def key(self) -> str: ...

    @property
    def answers(self) -> dict[object, object]:
        """What strategies have found out on it, by their questions, so that a question is worked out once. Neither holds a model. Specimens
        share one only where they build the very same small model.
        """

    def build(self) -> nn.Module:
        """A new model on the CPU, in float32 and in training mode, with dropout as it is configured. Names are those of the real model,
        with other numbers of blocks.
        """

    def batch(self) -> Mapping[str, Tensor]:
        """Keyword arguments of its forward on the CPU, of two sequences or more; with labels where the model takes them and a forward pass
        with them is known to run. The same each time.
        """


class SpecimenError(ColossalError):
    """No small model of this kind can be made; the message says why."""


def pattern_of(name: str) -> str:
    """A module's or parameter's name with `*` for each number in it: `model.layers.*.self_attn.q_proj.weight`."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)


def patterns_of(names: Iterable[str]) -> frozenset[str]:
    """The different patterns of some names."""
    return frozenset(map(pattern_of, names))
