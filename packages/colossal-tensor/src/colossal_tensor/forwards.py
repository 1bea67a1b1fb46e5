"""A module's forward method that works on its copies too: what stands in the place of one calls the old one on the module it is given."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


def unbound(module: nn.Module) -> Callable[..., Any]:
    """The module's forward as a function of (module, arguments). One that is no method (somebody has put a function there) stays what it
    is, on copies too.
    """
    forward = module.forward
    if isinstance(forward, MethodType):
        found: Callable[..., Any] = forward.__func__
        return found

    def of_any(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        del module
        return forward(*args, **kwargs)

    return of_any
