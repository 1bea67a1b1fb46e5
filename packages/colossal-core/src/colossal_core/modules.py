"""Reaching a module's parameters by name without changing any name: tied parameters stay tied, meta parameters become real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode that it was in (a frozen part may be kept in evaluation)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def cast_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts every floating buffer, persistent or not, in place of the old one (fp64: nothing may stay behind in float32)."""
    _replace_buffers(model, lambda buffer: buffer.to(dtype) if buffer.is_floating_point() else buffer)


def settle_buffers(model: nn.Module, device: torch.device, agreed: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Every buffer on the device, contiguous as a checkpoint wants it, with the value that `agreed` gives for its own. The ones
    on the meta device are left alone.
    """
    _replace_buffers(model, lambda buffer: buffer if buffer.is_meta else agreed(buffer).to(device).contiguous())


def _replace_buffers(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Puts `change(buffer)` in the place of every buffer. What several modules hold is changed once and stays one tensor."""
    changed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the old one, so that no id is used again
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in changed:
                changed[id(buffer)] = (buffer, change(buffer))
            new = changed[id(buffer)][1]
            if new is not buffer:
                module.register_buffer(name, new, persistent=name not in module._non_persistent_buffers_set)
