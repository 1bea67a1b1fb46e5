"""Which modules reach their kernels through a registered interface of transformers, found in their code and never by name of class.

A transformers attention module asks an `AttentionInterface` object for its function, an experts module an `ExpertsInterface`. The object
is a global or a closure variable of the module's `forward`, so its type is looked up there: no import of transformers is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

ATTENTION_INTERFACE = "AttentionInterface"
EXPERTS_INTERFACE = "ExpertsInterface"
FUSED_ATTENTION = "scaled_dot_product_attention"


def modules_reaching(model: nn.Module, interface: str) -> tuple[str, ...]:
    """Names of the modules, in order, whose class's own code refers to an object of a type named `interface`."""
    known: dict[type, bool] = {}
    found = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind not in known:
            known[kind] = any(_refers_to(function, interface) for function in _own_functions(kind))
        if known[kind]:
            found.append(name)
    return tuple(found)


def calls_fused_attention(kind: type[nn.Module]) -> bool:
    """Whether the class itself calls torch's fused attention, or is torch's own multi-head attention, which does."""
    if issubclass(kind, nn.MultiheadAttention):
        return True
    return any(FUSED_ATTENTION in names for function in _own_functions(kind) for names in _names(function.__code__))


def _own_functions(kind: type) -> Iterator[FunctionType]:
    """The methods of a module class and its parents, every layer of decoration by itself.

    Not those of `nn.Module` and of transformers' `PreTrainedModel`, whose methods for choosing an implementation name the interfaces too.
    """
    for parent in kind.__mro__:
        if parent is nn.Module or parent.__name__ == "PreTrainedModel":
            return
        for value in vars(parent).values():
            function: object = value
            while isinstance(function, FunctionType):
                yield function
                function = vars(function).get("__wrapped__")


def _names(code: CodeType) -> Iterator[tuple[str, ...]]:
    yield code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _names(constant)


def _refers_to(function: FunctionType, interface: str) -> bool:
    for names in _names(function.__code__):
        if any(_is_a(function.__globals__.get(name), interface) for name in names):
            return True
    closure = inspect.getclosurevars(function).nonlocals if function.__closure__ else {}
    return any(_is_a(value, interface) for value in closure.values())


def _is_a(value: object, interface: str) -> bool:
    return any(parent.__name__ == interface for parent in type(value).__mro__)
