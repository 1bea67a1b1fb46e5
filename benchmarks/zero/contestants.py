"""Every contestant behind one line, `step(ids) -> loss`: torch's DDP and FSDP2 at their best, and ours by its public API.

All have the same model, first values, attention, per-block compile and optimizer settings (AdamW, 1e-4, betas 0.9 and 0.95, decay 0.1
on every parameter, no clipping), float32 masters and reductions, bfloat16 compute. The peers' loss is a compiled cross-entropy; ours is the
library's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from zero.models import Filler, Shape, initial_weights, on_meta
from zero.rows import Row

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from colossal_core.trained import Trained

LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 0.1
DDP_BUCKET_MIB = 100
"""torch's 25 MiB buckets use NVLink at two thirds of its rate; 100 MiB is close to all of it, and a block of GPT-2 is 117 MiB."""
RECOMPILE_LIMIT = 256


class Contestant(Protocol):
    """One optimizer step on ids [B, T] of this rank; the loss is 0-d, on the device, of this rank or of all."""

    def step(self, ids: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class World:
    """The processes: this one's rank and device, and a one-dimensional mesh of all."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh


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
    if not row.is_peer:
        return Ours(row, shape, world)
    return _ddp(row, shape, world) if row.kind == "ddp" else _fsdp2(row, shape, world)


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


def config_of(row: Row, world_size: int) -> dict[str, Any]:
    """The whole config of one of ours, as a user would write it."""
    optimizer: dict[str, Any] = {"name": row.optimizer, "lr": LEARNING_RATE, "max_grad_norm": None}
    if row.optimizer == "adamw":
        optimizer |= {"betas": BETAS, "weight_decay": WEIGHT_DECAY, "no_decay": "none"}
    return {
        "batch": {"global_size": row.micro_batch * world_size, "micro_size": row.micro_batch},
        "precision": "bf16",
        "optimizer": optimizer,
        "scheduler": {"name": "constant"},
        "train": {"num_steps": 10**6},
        "compile": {"enabled": row.compiled},
        "recompute": {"mode": row.recompute},
        "parallel": {"zero": row.zero_options},
    }


class Peer:
    """A wrapped model with torch's own loop. autocast: DDP computes in bfloat16 by it; FSDP2 casts its parameters itself.

    transformers asks in every forward pass whether rows are packed, and waits for the device's answer. The library spares its users that,
    and the peers are spared it here: without, FSDP2 lost a sixth of its speed at GPT-2's micro-batch 8 (4 H200s, 2026-11-21).
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *, autocast: bool
    ) -> None:
        model.train()
        from colossal_core.transformers_checks import FirstAnswers

        self._model, self._loss, self._autocast = model, loss, autocast
        self._answers = FirstAnswers()
        own = (module for module in model.modules() if type(module).__module__.startswith("transformers."))
        self._asking = next(own)  # not the root, whose class FSDP2 and DDP replace
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
        loss = self._loss(
            self._logits(ids), labels
        )  # the logits are not held here: backward frees them as soon as it can
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        with (
            self._answers.remembered(self._asking),
            torch.autocast(ids.device.type, torch.bfloat16, enabled=self._autocast),
        ):
            logits: torch.Tensor = self._model(input_ids=ids).logits
            return logits


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits [B, T, V] over the labels [B, T] that are not -100, in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def _peer_loss(row: Row) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return torch.compile(mean_loss, dynamic=False) if row.compiled else mean_loss


def _prepare_blocks(model: nn.Module, row: Row, shape: Shape) -> None:
    """Recomputation and compilation of each block, by replacing `forward`: hooks stay outside what is compiled."""
    import torch._dynamo.config as dynamo_config

    settings: Any = dynamo_config
    settings.recompile_limit = RECOMPILE_LIMIT
    settings.optimize_ddp = False  # it would cut a block's graph into pieces; blocks are small enough to overlap
    for name in shape.block_names():
        block = model.get_submodule(name)
        forward: Callable[..., Any] = block.forward
        if row.recompute == "full":
            forward = _recomputed(forward)
        if row.compiled:
            forward = torch.compile(forward, dynamic=False)
        vars(block)["forward"] = forward


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _ddp(row: Row, shape: Shape, world: World) -> Contestant:
    """DistributedDataParallel: float32 parameters, autocast, gradients in the buckets' memory, float32 all-reduce."""
    model = on_meta(shape)
    filler = Filler(model, shape.block_names(), world.device)
    for unit in filler.units():
        filler.fill(unit)
    _prepare_blocks(model, row, shape)
    devices = None if world.device.type == "cpu" else [world.device.index]
    wrapped = nn.parallel.DistributedDataParallel(
        model, device_ids=devices, gradient_as_bucket_view=True, bucket_cap_mb=DDP_BUCKET_MIB
    )
    return Peer(wrapped, _peer_loss(row), autocast=True)


def _fsdp2(row: Row, shape: Shape, world: World) -> Contestant:
    """`fully_shard` of every block and of the rest: float32 shards, bfloat16 compute, float32 reduce-scatter.

    Each block is sharded as soon as it has its values, so that no rank ever holds the whole model.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = on_meta(shape)
    filler = Filler(model, shape.block_names(), world.device)
    _prepare_blocks(model, row, shape)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    reshard = row.kind == "fsdp2-z3"
    for name in shape.block_names():
        filler.fill(name)
        fully_shard(model.get_submodule(name), mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)
    filler.fill("")
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=None if reshard else False)
    return Peer(model, _peer_loss(row), autocast=False)
