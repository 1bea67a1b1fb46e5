"""How a part of a model is proven to be an op: the same values and the same gradients on random numbers, in float64 throughout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from colossal_core.dataflow import meta_copy
from colossal_core.difference import EXACT, relative_difference
from colossal_core.float64 import Float64Throughout

_SEED = 20_191_016

_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has."""

Function = Callable[..., "Tensor | Sequence[Tensor]"]


@contextmanager
def drawing() -> Iterator[None]:
    """Inside, the CPU is the default device, numbers are drawn from a fixed seed and all is float64; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), Float64Throughout():
        torch.default_generator.manual_seed(_SEED)
        yield


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    """Random normal numbers that want a gradient."""
    return (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()


def is_same(found: Function, wanted: Function, inputs: Sequence[Tensor]) -> bool:
    """Whether two functions give the same tensors, and for random gradients of those the same gradients of every input, to 1e-12. A
    function that raises is not the same as any.
    """
    try:
        of_found, of_wanted = _results(found, inputs), _results(wanted, inputs)
    except Exception:  # whatever a stranger's forward raises
        return False
    if [one.shape for one in of_found] != [one.shape for one in of_wanted]:
        return False
    return all(relative_difference(one, other) <= EXACT for one, other in zip(of_found, of_wanted, strict=True))


def _results(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    made = function(*inputs)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    torch.default_generator.manual_seed(_SEED)
    wanted = [torch.randn(output.shape, dtype=torch.float64) for output in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs), wanted, allow_unused=True, materialize_grads=True)
    return [output.detach() for output in outputs] + list(gradients)


def with_random_values(module: nn.Module) -> nn.Module:
    """A copy of a small module on the CPU, in float64, with every parameter drawn between 0.5 and 1.5. Hooks are left out."""
    copied = meta_copy(module).to_empty(device="cpu").double()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.copy_(torch.rand(parameter.shape, dtype=torch.float64) + 0.5)
    return copied.requires_grad_()


def attributes_of(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """What a module keeps beside parameters, buffers and modules, in a form that can be compared: plain values as they are written, others
    by which object they are (layers share their config).
    """
    kept = vars(module).items()
    plain = (bool, int, float, str, tuple, type(None))
    return tuple(
        sorted(
            (name, repr(value) if isinstance(value, plain) else str(id(value)))
            for name, value in kept
            if name not in _OF_TORCH
        )
    )
