"""The settings of a user's own optimizer, saved with the checkpoints: a learning-rate scheduler may have changed them."""

from __future__ import annotations

from typing import Any

import torch

from colossal_core.errors import CheckpointError
from colossal_core.optimizers import ClippingOptimizer


class GroupSettings:
    """The settings of a user's optimizer groups (rates, betas, ...) as something to save: a scheduler may have changed them."""

    def __init__(self, optimizer: ClippingOptimizer) -> None:
        self._groups = optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        """Numbers, texts and tuples of them; 0-d tensors as numbers. Whatever else a group holds is the user's to set again."""
        return {
            "groups": [
                {key: kept for key, value in group.items() if (kept := _plain(value)) is not None}
                for group in self._groups
            ]
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises CheckpointError for another number of groups."""
        saved = state_dict["groups"]
        if len(saved) != len(self._groups):
            message = f"checkpoint: the optimizer has {len(self._groups)} groups, the saved one had {len(saved)}: hand over the same groups"
            raise CheckpointError(message)
        for group, settings in zip(self._groups, saved, strict=True):
            for key, value in settings.items():
                if isinstance(group.get(key), torch.Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """The value as JSON holds it, or None where it does not."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else None
    if isinstance(value, tuple | list):
        return list(value) if all(isinstance(item, bool | int | float | str) for item in value) else None
    return value if isinstance(value, bool | int | float | str) else None
