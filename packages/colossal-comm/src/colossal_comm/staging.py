"""Buffers between a caller's tensors and a transport: contiguous copies, one flat buffer a dtype, and NaN in maxima and minima."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from colossal_core.collectives import ReduceOp, Transfer


@dataclass(frozen=True)
class Staged:
    """A contiguous buffer for the transport. finish: puts the result where the caller wants it; None where it already is."""

    buffer: torch.Tensor
    finish: Callable[[], None] | None = None


def in_place(tensor: torch.Tensor) -> Staged:
    """The tensor itself, or a contiguous copy that is copied back."""
    if tensor.is_contiguous():
        return Staged(tensor.detach())
    buffer = tensor.detach().contiguous()
    return Staged(buffer, lambda: _copy(tensor, buffer))


def for_output(tensor: torch.Tensor) -> Staged:
    """As `in_place`, for a tensor that is only written."""
    if tensor.is_contiguous():
        return Staged(tensor.detach())
    buffer = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return Staged(buffer, lambda: _copy(tensor, buffer))


def for_reduction(tensor: torch.Tensor, op: ReduceOp) -> Staged:
    """For sums the tensor itself. For max and min of floating point a flag travels with each element, because gloo drops NaN.

    The buffer is [values with NaN replaced by the neutral element, flags]: twice the bytes, but maxima are taken of few numbers.
    """
    if op == "sum" or not tensor.is_floating_point():
        return in_place(tensor)
    sign = 1.0 if op == "max" else -1.0
    flat = tensor.detach().reshape(-1)
    missing = flat.isnan()
    neutral = torch.full_like(flat, -sign * torch.inf)
    buffer = torch.cat([torch.where(missing, neutral, flat), missing.to(flat.dtype) * sign])

    def finish() -> None:
        values, flags = buffer.chunk(2)
        _copy(tensor, torch.where(flags != 0, torch.full_like(values, torch.nan), values).view(tensor.shape))

    return Staged(buffer, finish)


def flattened(tensors: Sequence[torch.Tensor]) -> list[Staged]:
    """One flat buffer for each dtype, in order of first appearance. A dtype with one contiguous tensor needs no copy."""
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
    return [_flattened(same) for same in by_dtype.values()]


def _flattened(tensors: list[torch.Tensor]) -> Staged:
    if len(tensors) == 1:
        return in_place(tensors[0])
    buffer = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

    def finish() -> None:
        parts = torch.split(buffer, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            _copy(tensor, part.view(tensor.shape))

    return Staged(buffer, finish)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


def split_own(transfers: Sequence[Transfer], own: int) -> tuple[list[Transfer], list[Transfer]]:
    """The transfers of a rank with itself (two stages of one rank), and the others."""
    local = [transfer for transfer in transfers if transfer.peer == own]
    return local, [transfer for transfer in transfers if transfer.peer != own]


def hand_over(transfers: Sequence[Transfer]) -> None:
    """Copies what a rank sends to itself, in order."""
    sent = [transfer.tensor for transfer in transfers if transfer.kind == "send"]
    received = [transfer.tensor for transfer in transfers if transfer.kind == "receive"]
    for target, source in zip(received, sent, strict=True):
        _copy(target, source)


def for_exchange(transfers: Sequence[Transfer]) -> tuple[list[Transfer], Callable[[], None] | None]:
    """The transfers with contiguous tensors, and how to bring received ones home."""
    from colossal_core.collectives import Transfer as Half

    staged: list[Transfer] = []
    finishes: list[Callable[[], None]] = []
    for transfer in transfers:
        if transfer.kind == "send":
            staged.append(Half("send", transfer.tensor.detach().contiguous(), transfer.peer))
            continue
        target = for_output(transfer.tensor)
        staged.append(Half("receive", target.buffer, transfer.peer))
        if target.finish is not None:
            finishes.append(target.finish)
    if not finishes:
        return staged, None

    def finish_all() -> None:
        for finish in finishes:
            finish()

    return staged, finish_all
