"""Reaching a module's parameters by name without changing any name: tied parameters stay tied, meta parameters become real."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class ParameterSlots:
    """Every place in a module tree where each parameter is held.

    names: for each parameter all its names, the full name first (as `ModelAnatomy.parameters` has them).
    """

    def __init__(self, model: nn.Module, names: Sequence[Sequence[str]]) -> None:
        self._model = model
        self._names = {group[0]: tuple(group) for group in names}

    def parameter(self, full_name: str) -> nn.Parameter:
        return self._model.get_parameter(full_name)

    def dtype(self, full_name: str) -> torch.dtype:
        return self.parameter(full_name).dtype

    def place(self, full_name: str, storage: torch.Tensor) -> nn.Parameter:
        """Makes `storage` the parameter's data and returns the parameter object that the module then holds.

        The object stays the user's own where it is real already; a meta parameter is replaced in every place that holds it.
        """
        parameter = self.parameter(full_name)
        if not parameter.is_meta:
            parameter.grad = None
            parameter.data = storage
            return parameter
        made = nn.Parameter(storage, requires_grad=parameter.requires_grad)
        for name in self._names[full_name]:
            owner, _, attribute = name.rpartition(".")
            setattr(self._model.get_submodule(owner), attribute, made)
        return made


def cast_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts every floating buffer, persistent or not, in place of the old one (fp64: nothing may stay behind in float32)."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module.register_buffer(
                    name, buffer.to(dtype), persistent=name not in module._non_persistent_buffers_set
                )


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Moves every buffer to the device; the ones still on the meta device are left for materialisation."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta and buffer.device != device:
                module.register_buffer(
                    name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set
                )
