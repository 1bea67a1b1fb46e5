"""What a call of an op gives, and how far that is from the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from colossal_kernels.bench.case import Call, Direction, Function


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors in nested lists and tuples, in order."""
    if isinstance(values, Tensor):
        return [values]
    return [found for value in values for found in tensors_of(value)] if isinstance(values, list | tuple) else []


def mapped(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """The call with every tensor changed; lists and tuples stay what they are."""

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return type(value)(walk(item) for item in value) if type(value) in (list, tuple) else value

    keywords = {key: walk(value) for key, value in call.keywords.items()}
    return Call(tuple(walk(value) for value in call.arguments), keywords)


def copied(call: Call) -> Call:
    """Tensors of its own, of the same strides, which require gradients where the others do."""
    return mapped(call, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))


def widened(call: Call, dtype: torch.dtype) -> Call:
    def change(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)

    return mapped(call, change)


def inputs_of(call: Call) -> list[Tensor]:
    """Those that are differentiated."""
    found = tensors_of([*call.arguments, *call.keywords.values()])
    return [tensor for tensor in found if tensor.requires_grad]


def ends_of(outputs: Any) -> list[Tensor]:
    return [output for output in tensors_of(outputs) if output.requires_grad]


def gradient_weights(ends: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """What arrives at the outputs in backward: one at a loss, random at everything else, the same for everyone that is compared."""
    found = []
    for end in ends:
        generator = torch.Generator(end.device)
        generator.manual_seed(seed)
        drawn = torch.randn(end.shape, generator=generator, device=end.device, dtype=torch.float32)
        found.append(torch.ones_like(end) if end.dim() == 0 else drawn.to(torch.bfloat16).to(end.dtype))
    return found


def outcome(function: Function, call: Call, directions: Iterable[Direction]) -> list[Tensor]:
    """All outputs and gradients, or what a step has changed its arguments to (and what it returns)."""
    if "step" in directions:
        with torch.no_grad():
            returned = function(*call.arguments, **call.keywords)
        return [*tensors_of([*call.arguments, *call.keywords.values()]), *tensors_of(returned)]
    outputs = function(*call.arguments, **call.keywords)
    found = [output.detach() for output in tensors_of(outputs)]
    ends, inputs = ends_of(outputs), inputs_of(call)
    if not ends or not {"backward", "both"} & set(directions):
        return found
    found += torch.autograd.grad(ends, inputs, gradient_weights(ends), materialize_grads=True)
    return found


def distance(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest of `||found - truth|| / ||truth||` over the floating tensors, infinite where something is not finite where the truth is,
    or an integer differs, or there are not as many. A tensor whose truth is zero, or tiny beside the others, is held against their size.
    """
    if len(found) != len(truth):
        return math.inf
    floor = 1e-3 * math.hypot(*(math.sqrt(_squares(tensor)) for tensor in truth if _counts_as_number(tensor)))
    return max((_distance(one, other, floor) for one, other in zip(found, truth, strict=True)), default=0.0)


def _counts_as_number(tensor: Tensor) -> bool:
    """Codes of 8 bits do: neighbours are nearly right. Labels, places and counts do not."""
    return tensor.is_floating_point() or tensor.dtype == torch.int8


def _squares(tensor: Tensor) -> float:
    return sum(float(piece.double().square().sum()) for piece in _pieces(tensor))


def _distance(found: Tensor, truth: Tensor, floor: float) -> float:
    if found.shape != truth.shape:
        return math.inf
    if not _counts_as_number(truth):
        return 0.0 if torch.equal(found.to(truth.dtype), truth) else math.inf
    pairs = zip(_pieces(found), _pieces(truth), strict=True)
    squared = sum(float((one.double() - other.double()).square().sum()) for one, other in pairs)
    if not math.isfinite(squared):
        return math.inf
    largest = max(math.sqrt(_squares(truth)), floor)
    return 0.0 if squared == 0.0 else math.sqrt(squared) / largest if largest > 0.0 else math.inf


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Of at most 64 Mi elements, so that their float64 copies stay small."""
    found: Sequence[Tensor] = tensor.detach().reshape(-1).split(1 << 26)
    return found
