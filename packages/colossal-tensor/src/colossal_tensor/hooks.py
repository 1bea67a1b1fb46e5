"""Hooks that change what a module is called with, or what it returns. They are plain data and methods: torch.compile traces them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positions and keywords of a call."""


@dataclass(frozen=True)
class ArgumentHook:
    """Changes some arguments of every call, by position ("0") or keyword."""

    arguments: tuple[str, ...]
    change: Callable[[Any], Any]

    def install(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        del module
        return with_arguments(args, kwargs, self.arguments, self.change)


@dataclass(frozen=True)
class OutputHook:
    """Changes the tensor that a module returns, or the one at `index` where it returns several."""

    change: Callable[[torch.Tensor], torch.Tensor]
    index: int = 0

    def install(self, module: nn.Module) -> None:
        module.register_forward_hook(self.after)

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        return with_output(output, self.index, self.change)


def with_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], arguments: tuple[str, ...], change: Callable[[Any], Any]
) -> Arguments:
    """The arguments of a call with some of them changed, by position or keyword."""
    changed = list(args)
    for argument in arguments:
        if argument.isdigit():
            changed[int(argument)] = change(changed[int(argument)])
        else:
            kwargs = {**kwargs, argument: change(kwargs[argument])}
    return tuple(changed), kwargs


def with_output(output: Any, index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What a module returns, a tensor or several, with one of them changed."""
    if isinstance(output, torch.Tensor):
        return change(output)
    parts = list(output)
    parts[index] = change(parts[index])
    return parts if type(output) is list else tuple(parts)
