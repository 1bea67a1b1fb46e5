"""torch's data parallelism: DDP and FSDP2, in torch's own loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from beside_peers.config import BETAS, LEARNING_RATE, WEIGHT_DECAY
from beside_peers.liger import liger_rotary, patch
from beside_peers.models import Filler, Shape, on_meta
from beside_peers.rows import Row
from beside_peers.world import World
from torch import nn

DDP_BUCKET_MIB = 100
"""torch's 25 MiB buckets use NVLink at two thirds of its rate; 100 MiB is close to all of it, and a block of GPT-2 is 117 MiB."""
RECOMPILE_LIMIT = 256


class Peer:
    """A wrapped model with torch's own loop.

    transformers asks in every forward pass whether rows are packed, and waits for the device's answer. The library spares its users that,
    and the peers are spared it here: without, FSDP2 lost a sixth of its speed at GPT-2's micro-batch 8 (4 H200s, 2026-11-21).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        autocast: bool = False,
        positions: bool = False,
        micro: int = 0,
        own_loss: bool = False,
        around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        """autocast: DDP computes in bfloat16 by it; FSDP2 casts its parameters itself. positions: the model is told them, because it sees
        less than the sequence. micro: sequences of one forward pass, 0: all; gradients are reduced after each. own_loss: the model
        computes it, from labels that are its inputs. around: entered for the forward pass, the loss and the backward pass.
        """
        model.train()
        from colossal_core.transformers_checks import FirstAnswers

        self._model, self._loss, self._autocast, self._around = model, loss, autocast, around
        self._positions = positions
        self._micro, self._own_loss = micro, own_loss
        self._answers = FirstAnswers()
        own = (module for module in model.modules() if type(module).__module__.startswith("transformers."))
        self._asking = next(own)  # not the root, whose class FSDP2 and DDP replace
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        parts = torch.split(ids, self._micro or len(ids))
        losses = [self._passed(part, len(parts)) for part in parts]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _passed(self, ids: torch.Tensor, num_parts: int) -> torch.Tensor:
        """The loss of some sequences, the gradients of their part of the whole left where those of the others are."""
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
        with self._around():
            # The logits are not held here: backward frees them as soon as it can.
            loss = (
                self._called(ids, labels=ids).loss if self._own_loss else self._loss(self._called(ids).logits, labels)
            )
            torch.autograd.backward(loss if num_parts == 1 else loss / num_parts)
        return self._own(loss.detach())

    @staticmethod
    def _own(loss: torch.Tensor) -> torch.Tensor:
        """A plain tensor: of split logits, the loss is a DTensor that every rank has whole."""
        from torch.distributed.tensor import DTensor

        return loss.to_local() if isinstance(loss, DTensor) else loss

    def _called(self, ids: torch.Tensor, **more: torch.Tensor) -> Any:
        """What the model returns."""
        if self._positions:
            more["position_ids"] = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        with (
            self._answers.remembered(self._asking),
            torch.autocast(ids.device.type, torch.bfloat16, enabled=self._autocast),
        ):
            return self._model(input_ids=ids, **more)


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits [B, T, V] over the labels [B, T] that are not -100, in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def loss_of(row: Row) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The peers' loss, compiled where the blocks are."""
    eager = not row.compiled or row.parsed.eager_loss
    return mean_loss if eager else torch.compile(mean_loss, dynamic=False)


def prepare_blocks(model: nn.Module, row: Row, shape: Shape) -> None:
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
        if row.compiles_blocks:
            forward = torch.compile(forward, dynamic=False)
        vars(block)["forward"] = forward


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def data_parallel(row: Row, shape: Shape, world: World) -> Peer:
    """DistributedDataParallel: float32 parameters, autocast, gradients in the buckets' memory, float32 all-reduce."""
    model = on_meta(shape)
    filler = Filler(model, shape.block_names(), world.device)
    for unit in filler.units():
        filler.fill(unit)
    prepare_blocks(model, row, shape)
    devices = None if world.device.type == "cpu" else [world.device.index]
    wrapped = nn.parallel.DistributedDataParallel(
        model, device_ids=devices, gradient_as_bucket_view=True, bucket_cap_mb=DDP_BUCKET_MIB
    )
    return Peer(wrapped, loss_of(row), autocast=True, micro=row.parsed.micro)


def fully_sharded(row: Row, shape: Shape, world: World) -> Peer:
    """`fully_shard` of every block and of the rest: float32 shards, bfloat16 compute, float32 reduce-scatter.

    Each block is sharded as soon as it has its values, so that no rank ever holds the whole model.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = on_meta(shape)
    if row.parsed.liger:
        patch(model, shape.architecture)
    filler = Filler(model, shape.block_names(), world.device)
    prepare_blocks(model, row, shape)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh, reshard = world.mesh()["data"], row.parsed.kind == "fsdp2-z3"
    for name in shape.block_names():
        filler.fill(name)
        fully_shard(model.get_submodule(name), mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    filler.fill("")
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=None if reshard else False)
    if row.parsed.liger:
        return Peer(model, loss_of(row), micro=row.parsed.micro, own_loss=True, around=liger_rotary)
    return Peer(model, loss_of(row), micro=row.parsed.micro)
