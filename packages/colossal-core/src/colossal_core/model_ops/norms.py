"""Normalisations in a model: modules of one vector, or of a weight and a bias, that compute `rms_norm` or `layer_norm`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colossal_core.model_ops.proving import attributes_of, drawing, drawn, is_same, with_random_values
from colossal_core.model_ops.remaking import PREFIX
from colossal_core.ops import norms

_TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm)

NORMED = f"{PREFIX}normed"
"""Attribute of a norm whose forward is the op's: that forward again, so that another one put in its place is seen."""


@dataclass(frozen=True)
class Norm:
    """What a module computes. op: `rms_norm` or `layer_norm`. weight, bias: names of its parameters, None: it has none. offset: what is
    added to the weight before it multiplies (1 in Gemma).
    """

    op: str
    weight: str | None
    bias: str | None
    eps: float
    offset: float = 0.0

    def bound(self, function: Callable[..., Tensor], module: nn.Module, x: Tensor) -> Tensor:
        """An implementation of the op, called as this module would compute."""
        return function(x, *self.arguments(module), offset=self.offset)

    def arguments(self, module: nn.Module) -> tuple[Tensor | float | None, ...]:
        """What the op takes behind its rows."""
        weight = None if self.weight is None else getattr(module, self.weight)
        if self.op == "rms_norm":
            return weight, self.eps
        return weight, None if self.bias is None else getattr(module, self.bias), self.eps

    def fits(self, module: nn.Module, x: Tensor) -> bool:
        """Whether rows have the dtype of the module's vectors: models differ in what they round to where they have not."""
        name = self.weight if self.weight is not None else self.bias
        return name is None or x.dtype == getattr(module, name).dtype


REFERENCES: dict[str, Callable[..., Tensor]] = {"rms_norm": norms.rms_norm, "layer_norm": norms.layer_norm}


def is_candidate(module: nn.Module) -> bool:
    """Whether a module is built like a norm: nothing in it but one or two vectors of one length, or torch's own norm of one dimension."""
    parameters = dict(module.named_parameters(recurse=False))
    if next(module.children(), None) is not None or next(module.buffers(), None) is not None:
        return False
    if not parameters:
        return isinstance(module, _TORCH_NORMS) and len(module.normalized_shape) == 1
    shapes = {tuple(parameter.shape) for parameter in parameters.values()}
    return len(parameters) <= 2 and len(shapes) == 1 and len(shapes.pop()) == 1


def find_norm(module: nn.Module) -> Norm | None:
    """What a candidate computes, proven in values and gradients on rows of ordinary, of tiny (where eps decides) and of huge size (where a
    limit would) and with one to three leading dimensions; None where it is neither op.
    """
    with drawing():
        try:
            copied = with_random_values(module)
        except Exception:  # whatever a stranger's attributes raise when they are copied
            return None
        width = _width(copied)
        inputs = [
            drawn(2, 3, width),
            drawn(5, width, scale=1e-3),
            drawn(2, 1, 3, width),
            drawn(3, width, scale=1e-6),
            drawn(3, width, scale=1e4),
        ]
        found = next((norm for norm in _guesses(copied) if _is(copied, norm, inputs)), None)
    return found if found is not None and _keeps_dtype(copied, width) else None


def _is(module: nn.Module, norm: Norm, inputs: list[Tensor]) -> bool:
    parameters = list(module.parameters())
    function = REFERENCES[norm.op]
    return all(
        is_same(lambda x, *_: module(x), lambda x, *_: norm.bound(function, module, x), [x, *parameters])
        for x in inputs
    )


def _keeps_dtype(module: nn.Module, width: int) -> bool:
    """Whether narrow rows stay narrow, as under the ops, and are not handed on in float32."""
    with torch.no_grad(), torch.device("cpu"):
        rows = torch.ones(2, width, dtype=torch.bfloat16)
        try:
            return bool(module.to(torch.bfloat16)(rows).dtype == torch.bfloat16)
        except Exception:  # whatever a stranger's forward raises
            return False


def _guesses(module: nn.Module) -> Iterator[Norm]:
    names = [name for name, _ in module.named_parameters(recurse=False)]
    for eps in _small_numbers(module):
        if not names:
            yield Norm("layer_norm" if isinstance(module, nn.LayerNorm) else "rms_norm", None, None, eps)
        elif len(names) == 1:
            yield Norm("rms_norm", names[0], None, eps)
            yield Norm("rms_norm", names[0], None, eps, offset=1.0)
            yield Norm("layer_norm", names[0], None, eps)
            yield Norm("layer_norm", names[0], None, eps, offset=1.0)
        else:
            for weight, bias in itertools.permutations(names):
                yield Norm("layer_norm", weight, bias, eps)
                yield Norm("layer_norm", weight, bias, eps, offset=1.0)


def _small_numbers(module: nn.Module) -> tuple[float, ...]:
    """What may be its eps: the small numbers that it keeps itself."""
    kept = (value for value in vars(module).values() if isinstance(value, float) and 0.0 < value < 0.1)
    return tuple(dict.fromkeys(kept))


def _width(module: nn.Module) -> int:
    first = next(module.parameters(), None)
    if first is not None:
        return first.numel()
    assert isinstance(module, _TORCH_NORMS), "only torch's norms have no parameter"
    return int(module.normalized_shape[0])


def shape_of(module: nn.Module) -> object:
    """What a proof depends on: modules of one class with equal shapes and attributes compute the same."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    return type(module), shapes, attributes_of(module), _width(module)


def normed(norm: Norm, function: Callable[..., Tensor], original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward method of a module that computes `norm`, by an implementation of the op.

    A call with more than one tensor, and rows of another dtype than the module's vectors, go to the module's own forward.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and norm.fits(self, args[0]):
            return norm.bound(function, self, args[0])
        return original(self, *args, **kwargs)

    return forward


def has_eps(module: nn.Module) -> bool:
    """Whether a candidate keeps a small number, as norms do and scales do not."""
    return bool(_small_numbers(module))
