"""Registration with torch: every kernel is an operator `colossal_kernels::name`, so that torch.compile, fake tensors and recomputation know
it.

`Library.define` and `impl` cost 2 us a call, `torch.library.custom_op` 8 (CPU, torch 2.13): at kernels of 30 us that is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from colossal_kernels.interpreting import interpreted

_LIBRARY = torch.library.Library("colossal_kernels", "FRAGMENT")


def define(schema: str, launch: Callable[..., Any], fake: Callable[..., Any], *, device: str = "CUDA") -> Any:
    """Defines an operator and returns it: `define("scale(Tensor x, float factor) -> Tensor", launch, fake)`.

    launch: runs the kernel on CUDA tensors (on the CPU's under the interpreter), with that tensor's device current. fake: the outputs'
    shapes and dtypes alone. device: `CPU` for what is no kernel of Triton's. Arguments that the schema marks as written (`Tensor(a!) x`)
    are changed in place.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    if device == "CUDA":
        _LIBRARY.impl(name, _on_its_device(launch), "CUDA")
    if device == "CPU" or interpreted():
        _LIBRARY.impl(name, launch, "CPU")
    torch.library.register_fake(f"colossal_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops.colossal_kernels, name), "default")  # noqa: B009 - torch types it as a namespace


def differentiate(
    name: str, backward: Callable[..., Any], save: Callable[[Any, tuple[Any, ...], Any], None], *, twice: bool = False
) -> None:
    """Gives an operator its gradient. save(ctx, inputs, output); backward(ctx, *gradients) returns one gradient for each input, or None.

    twice: backward is made of operations that have gradients themselves. Where it is not, a gradient of a gradient (`create_graph=True`)
    raises RuntimeError: it would be wrong without a word.
    """

    def once(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            reason = f"the kernel {name} has no second derivative (create_graph=True)"
            raise RuntimeError(f"{reason}: choose the provider `reference` for its op")
        return backward(ctx, *gradients)

    found = backward if twice else once
    torch.library.register_autograd(f"colossal_kernels::{name}", found, setup_context=save, lib=_LIBRARY)


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the tensor's."""

    def on_its_device(*arguments: Any) -> Any:
        first = next(found for found in _flat(arguments) if isinstance(found, torch.Tensor))
        if first.device.index == torch.cuda.current_device():
            return launch(*arguments)
        with torch.cuda.device(first.device):
            return launch(*arguments)

    return on_its_device


def _flat(values: Any) -> Any:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value
