"""Collectives that autograd sees, as operators that `torch.compile` keeps whole.

Each is a functional operator `colossal_comm::*` along dim 0; other dims are views around it, which a compiler can fuse. An
operator's arguments can only be tensors, numbers and text, so the collectives object is passed by its key and found in `_PARTICIPANTS`
when the operator runs (as torch does with its process groups). The operators call the asynchronous collectives and wait, so the
ledger, the debug mode and every transport work alike in eager and in compiled code, forward and backward.

Sources: the conjugate pairs f / g of Megatron-LM (Shoeybi et al., 2019, section 3) and gather / reduce-scatter of sequence
parallelism (Korthikanti et al., 2022, section 4.2.2).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from colossal_core.collectives import Axes, Cotangent, Handle, ReduceOp


class Participant(Protocol):
    """What the operators need of a collectives object."""

    def size(self, axes: Axes) -> int: ...

    def index(self, axes: Axes) -> int: ...

    def start_all_reduce(
        self, tensor: torch.Tensor, axes: Axes, *, op: ReduceOp = "sum", use: str = "reduce", tag: str = ""
    ) -> Handle: ...

    def start_all_gather(
        self, output: torch.Tensor, tensor: torch.Tensor, axes: Axes, *, use: str = "gather", tag: str = ""
    ) -> Handle: ...

    def start_reduce_scatter(
        self, output: torch.Tensor, tensor: torch.Tensor, axes: Axes, *, use: str = "reduce", tag: str = ""
    ) -> Handle: ...

    def all_to_all_on(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        axes: Axes,
        output_sizes: Sequence[int] | None,
        input_sizes: Sequence[int] | None,
        use: str,
        tag: str,
    ) -> Handle: ...

    def broadcast_on(self, tensor: torch.Tensor, axes: Axes, source: int, use: str, tag: str) -> Handle: ...


_KEYS = itertools.count()
_PARTICIPANTS: weakref.WeakValueDictionary[str, Participant] = weakref.WeakValueDictionary()


def register(participant: Participant) -> str:
    """The key under which operators find a collectives object, for as long as it lives."""
    key = f"collectives.{next(_KEYS)}"
    _PARTICIPANTS[key] = participant
    return key


def _names(axes: Axes) -> str:
    return axes if isinstance(axes, str) else ",".join(axes)


def _found(key: str, axes: str) -> tuple[Participant, Axes]:
    names = tuple(axes.split(","))
    return _PARTICIPANTS[key], names[0] if len(names) == 1 else names


def all_reduce(tensor: torch.Tensor, key: str, axes: Axes, cotangent: Cotangent, tag: str) -> torch.Tensor:
    """The sum. Backward: an all-reduce when the cotangent is partial, nothing when it is replicated."""
    result: torch.Tensor = torch.ops.colossal_comm.all_reduce(tensor, key, _names(axes), cotangent == "partial", tag)
    return result


def replicate(tensor: torch.Tensor, key: str, axes: Axes, tag: str) -> torch.Tensor:
    """The tensor itself. Backward: an all-reduce."""
    result: torch.Tensor = _Replicate.apply(tensor, key, _names(axes), tag)  # type: ignore[no-untyped-call]
    return result


def all_gather(tensor: torch.Tensor, key: str, axes: Axes, dim: int, cotangent: Cotangent, tag: str) -> torch.Tensor:
    """Concatenation along `dim`. Backward: a reduce-scatter, or this rank's range."""
    stacked: torch.Tensor = torch.ops.colossal_comm.all_gather(tensor, key, _names(axes), cotangent == "partial", tag)
    dim %= tensor.ndim
    return stacked.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(tensor: torch.Tensor, key: str, axes: Axes, dim: int, size: int, tag: str) -> torch.Tensor:
    """This rank's range along `dim` of the sum. Backward: an all-gather."""
    result: torch.Tensor = torch.ops.colossal_comm.reduce_scatter(_stacked(tensor, dim, size), key, _names(axes), tag)
    return result


def own_range(tensor: torch.Tensor, key: str, axes: Axes, dim: int, size: int, tag: str) -> torch.Tensor:
    """This rank's range along `dim`. Backward: an all-gather."""
    result: torch.Tensor = torch.ops.colossal_comm.own_range(_stacked(tensor, dim, size), key, _names(axes), tag)
    return result


def _stacked(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The ranges of `dim`, one a rank, as a dim of their own in front."""
    dim %= tensor.ndim
    shape = (*tensor.shape[:dim], size, tensor.shape[dim] // size, *tensor.shape[dim + 1 :])
    return tensor.reshape(shape).movedim(dim, 0)


def all_to_all(
    tensor: torch.Tensor,
    key: str,
    axes: Axes,
    output_sizes: Sequence[int] | None,
    input_sizes: Sequence[int] | None,
    tag: str,
) -> torch.Tensor:
    """Ranges of dim 0 to each rank. Backward: the same with the sizes exchanged."""
    result: torch.Tensor = torch.ops.colossal_comm.all_to_all(
        tensor,
        key,
        _names(axes),
        None if output_sizes is None else list(output_sizes),
        None if input_sizes is None else list(input_sizes),
        tag,
    )
    return result


def broadcast(tensor: torch.Tensor, key: str, axes: Axes, source: int, tag: str) -> torch.Tensor:
    """The source's tensor. Backward: the sum of all gradients at the source, zero elsewhere."""
    result: torch.Tensor = torch.ops.colossal_comm.broadcast(tensor, key, _names(axes), source, tag)
    return result


class _Replicate(torch.autograd.Function):
    """An operator may not return its argument, and a copy would cost memory: hence a Function."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, key: str, axes: str, tag: str) -> torch.Tensor:
        ctx.call = (key, axes, tag)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        key, axes, tag = ctx.call
        return torch.ops.colossal_comm.all_reduce(gradient, key, axes, False, tag), None, None, None


def _contiguous_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _empty(tensor: torch.Tensor, shape: Sequence[Any]) -> torch.Tensor:
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


def _all_reduce_now(tensor: torch.Tensor, key: str, axes: str, partial: bool, tag: str) -> torch.Tensor:
    participant, group = _found(key, axes)
    output = _contiguous_copy(tensor)
    participant.start_all_reduce(output, group, use="compute", tag=tag).wait()
    return output


def _all_gather_now(tensor: torch.Tensor, key: str, axes: str, partial: bool, tag: str) -> torch.Tensor:
    participant, group = _found(key, axes)
    output = _empty(tensor, (participant.size(group), *tensor.shape))
    participant.start_all_gather(output, tensor.detach(), group, use="compute", tag=tag).wait()
    return output


def _reduce_scatter_now(tensor: torch.Tensor, key: str, axes: str, tag: str) -> torch.Tensor:
    participant, group = _found(key, axes)
    output = _empty(tensor, tensor.shape[1:])
    participant.start_reduce_scatter(output, tensor.detach(), group, use="compute", tag=tag).wait()
    return output


def _own_range_now(tensor: torch.Tensor, key: str, axes: str, tag: str) -> torch.Tensor:
    participant, group = _found(key, axes)
    return _contiguous_copy(tensor[participant.index(group)])


def _all_to_all_now(
    tensor: torch.Tensor,
    key: str,
    axes: str,
    output_sizes: list[int] | None,
    input_sizes: list[int] | None,
    tag: str,
) -> torch.Tensor:
    participant, group = _found(key, axes)
    rows = tensor.shape[0] if output_sizes is None else sum(output_sizes)
    output = _empty(tensor, (rows, *tensor.shape[1:]))
    participant.all_to_all_on(output, tensor.detach(), group, output_sizes, input_sizes, "compute", tag).wait()
    return output


def _broadcast_now(tensor: torch.Tensor, key: str, axes: str, source: int, tag: str) -> torch.Tensor:
    participant, group = _found(key, axes)
    output = _contiguous_copy(tensor)
    participant.broadcast_on(output, group, source, "compute", tag).wait()
    return output


def _sum_at_source_now(tensor: torch.Tensor, key: str, axes: str, source: int, tag: str) -> torch.Tensor:
    participant, group = _found(key, axes)
    output = _contiguous_copy(tensor)
    participant.start_all_reduce(output, group, use="compute", tag=tag).wait()
    return output if participant.index(group) == source else output.zero_()


def _same_shape(tensor: torch.Tensor, *rest: object) -> torch.Tensor:
    return _empty(tensor, tensor.shape)


def _gathered_shape(tensor: torch.Tensor, key: str, axes: str, *rest: object) -> torch.Tensor:
    participant, group = _found(key, axes)
    return _empty(tensor, (participant.size(group), *tensor.shape))


def _range_shape(tensor: torch.Tensor, *rest: object) -> torch.Tensor:
    return _empty(tensor, tensor.shape[1:])


def _exchanged_shape(
    tensor: torch.Tensor, key: str, axes: str, output_sizes: list[int] | None, input_sizes: list[int] | None, tag: str
) -> torch.Tensor:
    return _empty(tensor, (tensor.shape[0] if output_sizes is None else sum(output_sizes), *tensor.shape[1:]))


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.arguments = inputs[1:]


def _all_reduce_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    key, axes, partial, tag = ctx.arguments
    if partial:
        gradient = torch.ops.colossal_comm.all_reduce(gradient, key, axes, partial, tag)
    return gradient, None, None, None, None


def _all_gather_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    key, axes, partial, tag = ctx.arguments
    operator = torch.ops.colossal_comm.reduce_scatter if partial else torch.ops.colossal_comm.own_range
    return operator(gradient, key, axes, tag), None, None, None, None


def _range_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Of a range of a sum and of a range of what every rank has: the whole gradient is everybody's ranges."""
    key, axes, tag = ctx.arguments
    return torch.ops.colossal_comm.all_gather(gradient, key, axes, True, tag), None, None, None


def _all_to_all_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    key, axes, output_sizes, input_sizes, tag = ctx.arguments
    result = torch.ops.colossal_comm.all_to_all(gradient, key, axes, input_sizes, output_sizes, tag)
    return result, None, None, None, None, None


def _broadcast_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    key, axes, source, tag = ctx.arguments
    return torch.ops.colossal_comm.sum_at_source(gradient, key, axes, source, tag), None, None, None, None


_LIBRARY = torch.library.Library("colossal_comm", "DEF")  # type: ignore[no-untyped-call]
"""torch's own table of operators; it lives as long as the process."""

for _schema, _run, _shape, _backward in (
    (
        "all_reduce(Tensor x, str key, str axes, bool partial, str tag)",
        _all_reduce_now,
        _same_shape,
        _all_reduce_backward,
    ),
    (
        "all_gather(Tensor x, str key, str axes, bool partial, str tag)",
        _all_gather_now,
        _gathered_shape,
        _all_gather_backward,
    ),
    (
        "reduce_scatter(Tensor x, str key, str axes, str tag)",
        _reduce_scatter_now,
        _range_shape,
        _range_backward,
    ),
    ("own_range(Tensor x, str key, str axes, str tag)", _own_range_now, _range_shape, _range_backward),
    (
        "all_to_all(Tensor x, str key, str axes, SymInt[]? output_sizes, SymInt[]? input_sizes, str tag)",
        _all_to_all_now,
        _exchanged_shape,
        _all_to_all_backward,
    ),
    ("broadcast(Tensor x, str key, str axes, int source, str tag)", _broadcast_now, _same_shape, _broadcast_backward),
    ("sum_at_source(Tensor x, str key, str axes, int source, str tag)", _sum_at_source_now, _same_shape, None),
):
    _LIBRARY.define(f"{_schema} -> Tensor")  # type: ignore[no-untyped-call]
    _operator = f"colossal_comm::{_schema.split('(')[0]}"
    _LIBRARY.impl(_operator, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(_operator, _shape, lib=_LIBRARY)
    if _backward is not None:
        torch.library.register_autograd(_operator, _backward, setup_context=_keep_arguments, lib=_LIBRARY)
