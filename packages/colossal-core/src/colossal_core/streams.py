"""Every source of random numbers of a model in training, seeded before each microbatch so that no mesh and no cut changes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colossal_core.keyed_dropout import install_keyed_dropout
from colossal_core.random import seed_fused

if TYPE_CHECKING:
    import torch
    from torch import nn


class ModelRandom:
    """Dropout, as a module or as a function that a module's method calls, draws numbers keyed by (seed, step, global sample, position,
    layer, feature). What draws for a whole microbatch at once (a fused kernel, a router of the model's own) is keyed by (seed, step, first
    global sample) instead: the same on every mesh that cuts the batch into the same microbatches.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.dropout = install_keyed_dropout(model)
        self._seed = seed

    def seed(self, step: int, first_sample: int, sample_ids: torch.Tensor) -> None:
        """sample_ids: [micro] int64, indices within the global batch, of which first_sample is the first."""
        self.dropout.set(self._seed, step, sample_ids, first_sample=first_sample)
        seed_fused(self._seed, step, first_sample)
