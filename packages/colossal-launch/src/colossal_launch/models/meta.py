"""Building a model without storage for its parameters, but with real buffers.

Under `torch.device("meta")` buffers that a constructor computes (rotary frequencies, masks, position numbers) are lost as well. Here only
parameters are: memory that `torch.empty` would allocate goes to the meta device, and what a constructor still makes for real (ones, zeros)
moves there when it is registered as a parameter, its value remembered where it is one number or small.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

_MOST_REMEMBERED_ELEMENTS = 1 << 20


@dataclass
class Constructed:
    """What constructors wrote into parameters: one number, or a small tensor. Keyed by id() of the meta parameter, which is kept alive."""

    values: dict[int, torch.Tensor] = field(default_factory=dict)
    kept: list[nn.Parameter] = field(default_factory=list)

    def named(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The values by full name: 0-d where one number fills the parameter."""
        return {
            name: self.values[id(parameter)]
            for name, parameter in model.named_parameters()
            if id(parameter) in self.values
        }


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` without a device allocates nothing: that is how constructors make parameters."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[Constructed]:
    """Inside, parameters of new modules are on the meta device and buffers are real. Not for two threads at once."""
    constructed = Constructed()
    moved: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def on_registration(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        known = moved.get(id(parameter))
        if known is not None and known[0]() is parameter:  # tied: the same object registered once more
            return known[1]
        on_meta = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        vars(on_meta).update(vars(parameter))
        moved[id(parameter)] = (weakref.ref(parameter), on_meta)
        value = _remembered(parameter.detach())
        if value is not None:
            constructed.values[id(on_meta)] = value
            constructed.kept.append(on_meta)
        return on_meta

    # torch's annotation says that the hook returns nothing; what it returns is registered instead (torch 2.11 to 2.13).
    hook = register_module_parameter_registration_hook(on_registration)  # type: ignore[arg-type]
    try:
        with _EmptyOnMeta():
            yield constructed
    finally:
        hook.remove()


def _remembered(value: torch.Tensor) -> torch.Tensor | None:
    if value.numel() == 0 or bool((value == value.flatten()[0]).all()):
        return value.flatten()[:1].sum()
    return value.clone() if value.numel() <= _MOST_REMEMBERED_ELEMENTS else None
