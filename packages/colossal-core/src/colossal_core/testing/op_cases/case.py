"""One call of an op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class OpCase:
    """One call. arguments: as the op takes them; floating tensors among them are differentiated, except where `in_place`.

    in_place: the op returns nothing and changes its arguments: those are compared.
    """

    name: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    in_place: bool = False


Normal = Callable[..., torch.Tensor]
"""Random numbers of a shape, in the dtype that is tried."""
Cases = Callable[[Normal, torch.Generator], Iterator[OpCase]]


def placed(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """The tensor on a device, with the strides that it has: `Tensor.to` would make what is not dense contiguous."""
    if tensor.is_contiguous():
        return tensor.to(device)
    once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    moved = torch.empty_strided(once.shape, once.stride(), dtype=once.dtype, device=device).copy_(once)
    return moved.expand(tensor.shape)
