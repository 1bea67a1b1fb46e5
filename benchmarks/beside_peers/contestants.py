"""Every contestant behind one line, `step(ids) -> loss`: torch's own at their best, and ours by its public API.

All have the same model, first values, attention, per-block compile and optimizer settings (AdamW, 1e-4, betas 0.9 and 0.95, decay 0.1
on every parameter, no clipping), float32 masters and reductions, bfloat16 compute. The peers' loss is a compiled cross-entropy; ours is the
library's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from beside_peers.config import config_of
from beside_peers.models import Shape, initial_weights, on_meta
from beside_peers.rows import Row
from beside_peers.world import World

if TYPE_CHECKING:
    from colossal_core.trained import Trained


class Contestant(Protocol):
    """One optimizer step on ids [B, T], the sequences of this rank and of those it shares matrices with; the loss is 0-d, on the device,
    of this rank or of all.
    """

    def step(self, ids: torch.Tensor) -> torch.Tensor: ...


@contextlib.contextmanager
def cudnn_attention_first() -> Iterator[None]:
    """cuDNN's attention where it can run, for everybody: 1.5x torch's flash kernel at head size 64, 1.9x at 128 (H200, 2026-11-21)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(order, set_priority=True):
        yield


def build(row: Row, shape: Shape, world: World) -> Contestant:
    """Builds a contestant; collective."""
    from beside_peers.peers import data_parallel, fully_sharded
    from beside_peers.tensor_peers import set_pipelining, tensor_parallel

    contestant = row.parsed
    set_pipelining(wanted=contestant.asynchronous)
    if not contestant.is_peer:
        return Ours(row, shape, world)

    if contestant.kind == "ddp":
        return data_parallel(row, shape, world)
    return fully_sharded(row, shape, world) if contestant.tensor_size == 1 else tensor_parallel(row, shape, world)


class Ours:
    """The library through its public API, as a user would write it."""

    def __init__(self, row: Row, shape: Shape, world: World) -> None:
        from colossal_launch import Booster

        model = on_meta(shape)
        weights = initial_weights(model, world.device)
        self.config = config_of(row, world.size)
        self.trained: Trained = Booster(self.config).boost(model, weights=weights)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        return self.trained.train_step({"input_ids": ids, "labels": ids}).loss
