"""Cutting this rank's share of a step into microbatches, and which global samples they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from colossal_core.errors import ColossalError

if TYPE_CHECKING:
    from colossal_core.plan import BatchPlan


def to_device(batch: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The batch on the device, floating tensors in the compute dtype. Copies from pinned memory do not wait."""
    moved = {}
    for key, value in batch.items():
        target = dtype if value.is_floating_point() else value.dtype
        moved[key] = value.to(device=device, dtype=target, non_blocking=True)
    return moved


def check_share(batch: Mapping[str, torch.Tensor], plan: BatchPlan) -> None:
    """Raises ColossalError unless every tensor's first dimension is this rank's share of the step."""
    if not batch:
        raise ColossalError("batch: is empty: a batch is a mapping of tensors, the forward's keyword arguments")
    for key, value in batch.items():
        size = value.shape[0] if value.dim() else 0
        if size != plan.share:
            message = (
                f"batch.{key}: has {size} sequences, and this rank's share of batch.global_size={plan.global_size} is {plan.share}: "
                "take batches from booster.dataloader, or change batch.global_size"
            )
            raise ColossalError(message)


def cut(batch: Mapping[str, torch.Tensor], index: int, micro_size: int) -> dict[str, torch.Tensor]:
    """The index-th microbatch: views of `micro_size` sequences."""
    return {key: value[index * micro_size : (index + 1) * micro_size] for key, value in batch.items()}


def sample_ids(plan: BatchPlan, data_index: int, microbatch: int, device: torch.device) -> torch.Tensor:
    """Indices within the global batch of a microbatch's sequences: [micro_size] int64. Rank d holds samples [d * share, (d+1) * share)."""
    first = data_index * plan.share + microbatch * plan.micro_size
    return torch.arange(first, first + plan.micro_size, device=device)
