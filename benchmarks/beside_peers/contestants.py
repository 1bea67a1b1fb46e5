"""Every contestant behind one line, `step(ids) -> loss`: torch's own at their best, and ours by its public API.

All have the same model, first values, attention, per-block compile and optimizer settings (AdamW, 1e-4, betas 0.9 and 0.95, decay 0.1
on every parameter, no clipping), float32 masters and reductions, bfloat16 compute. The peers' loss is a compiled cross-entropy; ours is the
library's own.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from beside_peers.config import config_of
from beside_peers.models import Shape, initial_weights, on_meta
from beside_peers.rows import Row
from beside_peers.world import World

if TYPE_CHECKING:
    from colossal_core.trained import Trained
    from colossal_pipeline import Trace


class Contestant(Protocol):
    """One optimizer step on ids [B, T], the sequences of this rank and of those it shares matrices with; the loss is 0-d, on the device,
    of this rank or of all.
    """

    def step(self, ids: torch.Tensor) -> torch.Tensor: ...


@runtime_checkable
class Recorded(Protocol):
    """A pipeline: one more step, and on rank 0 its time line."""

    def recorded_step(self, ids: torch.Tensor) -> Trace | None: ...


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


def build(row: Row, shape: Shape, world: World, recorded_step: int) -> Contestant:
    """Builds a contestant; collective. recorded_step: number, from 1, of the step of which a pipeline's time line is wanted."""
    from beside_peers.peers import data_parallel, fully_sharded
    from beside_peers.pipeline_peers import TorchPipeline
    from beside_peers.tensor_peers import set_pipelining, tensor_parallel

    contestant = row.parsed
    set_pipelining(wanted=contestant.asynchronous)
    if not contestant.is_peer:
        return OurPipeline(row, shape, world, recorded_step) if contestant.schedule else Ours(row, shape, world)
    if contestant.schedule:
        return TorchPipeline(row, shape, world)
    if contestant.kind == "ddp":
        return data_parallel(row, shape, world)
    return fully_sharded(row, shape, world) if contestant.tensor_size == 1 else tensor_parallel(row, shape, world)


class Ours:
    """The library through its public API, as a user would write it."""

    def __init__(
        self, row: Row, shape: Shape, world: World, more: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """more: keys of sections beside those that the row asks for."""
        from colossal_launch import Booster

        model = on_meta(shape)
        weights = initial_weights(model, world.device)
        self.config = config_of(row, world.size)
        for section, keys in (more or {}).items():
            self.config[section] = {**self.config.get(section, {}), **keys}
        self.trained: Trained = Booster(self.config).boost(model, weights=weights)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        return self.trained.train_step({"input_ids": ids, "labels": ids}).loss


class OurPipeline(Ours):
    """A pipeline that has one step recorded."""

    def __init__(self, row: Row, shape: Shape, world: World, recorded_step: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        pipeline = {**row.parsed.pipeline, "record_step": recorded_step}
        sections: dict[str, dict[str, Any]] = {
            "parallel": {"pipeline": pipeline},
            "checkpoint": {"directory": self._folder.name},
        }
        self._file = Path(self._folder.name) / f"pipeline-step-{recorded_step}.json"
        super().__init__(row, shape, world, sections)

    def recorded_step(self, ids: torch.Tensor) -> Trace | None:
        from colossal_pipeline import Trace

        self.step(ids)
        return Trace.read(self._file) if self._file.exists() else None
