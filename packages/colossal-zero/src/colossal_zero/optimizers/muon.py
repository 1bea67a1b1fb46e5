"""Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; weight decay and the size of the update after Liu et
al. 2025, "Muon is scalable for LLM training", equation 4)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from colossal_core.elementwise import AdamW
from colossal_core.optimizer_state import StateTensor
from colossal_core.optimizers import Groups, OptimizerContext, OptimizerSpec, with_defaults
from colossal_core.tensor_lists import Tensors, assign_unless, clipped
from colossal_zero.optimizers.copies import CopyExchange
from colossal_zero.optimizers.newton_schulz import orthogonalise
from colossal_zero.optimizers.ownership import MatrixExchange, bounded_buckets, owners
from colossal_zero.optimizers.sums import copied_axes, cut_axes, gradients_of

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.config import OptimizerConfig

DEFAULT_MOMENTUM = 0.95
OWNED_ELEMENTS = 1 << 26
"""Most elements of matrices that an owner gathers at a time (128 MiB in bf16), and as many of its own shards are updated at a time; two
buckets are on their way at once."""


def is_hidden_matrix(master: torch.Tensor, context: OptimizerContext) -> bool:
    """A matrix inside a block. Embeddings and heads lie outside every block; vectors, convolutions and stacks have other dimensions."""
    layout = context.shard(master).layout
    return layout.block in context.blocks and len(layout.shape) == 2 and min(layout.shape) > 1


class Muon:
    """For the matrices inside blocks:

    m <- momentum m + (1 - momentum) g;  u = orthogonalised (1 - momentum) g + momentum m
    p <- (1 - lr * weight_decay) p - lr * 0.2 sqrt(max(rows, columns)) u

    The factor gives updates the size of AdamW's, so that one rate serves both; everything else is updated by core's AdamW, at `adamw_lr`.

    The momentum is elementwise and stays in shards. Each matrix is orthogonalised whole at one owner among the ranks that hold its shards:
    the owners share the work evenly, and a matrix is sent once each way (in bf16 on CUDA; in float64 under fp64).

    Communication: two all-to-alls over the axes that cut the state for each bucket of matrices, the next bucket's on its way while one is
    computed; a rank sends 2 (n-1)/n of its own shard's elements. Where the state is not cut but copied (stage 0), the copies share the
    work: one all-gather a bucket, of the orthogonalised matrices.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig, context: OptimizerContext) -> None:
        momentum = DEFAULT_MOMENTUM if config.momentum is None else config.momentum
        defaults = {"lr": config.lr, "momentum": momentum, "weight_decay": config.weight_decay}
        split = [(group, [is_hidden_matrix(master, context) for master in group["params"]]) for group in groups]
        self._groups = with_defaults(_those(split, True), defaults)
        rest = _those(split, False)
        rate = config.lr if config.adamw_lr is None else config.adamw_lr
        self._adamw = AdamW([{**group, "lr": rate} for group in rest], config, context)
        self.param_groups = [*self._groups, *self._adamw.param_groups]
        self._context = context
        self._product = context.ops["symmetric_product"]
        self._momenta = {
            id(master): torch.zeros_like(master, requires_grad=False)
            for group in self._groups
            for master in group["params"]
        }
        self._buckets = [bucket for group in self._groups for bucket in _buckets(group, context)]

    @torch.no_grad()
    def clipped_step(self, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        self._adamw.clipped_step(clip, skip)
        arriving = self._start(self._buckets[0], clip, skip) if self._buckets else None
        returning = None
        for index, bucket in enumerate(self._buckets):
            following = self._buckets[index + 1] if index + 1 < len(self._buckets) else None
            after = None if following is None else self._start(following, clip, skip)
            assert arriving is not None
            matrices = bucket.exchange.finish_gather(arriving)
            started = bucket.exchange.start_scatter([orthogonalise(batch, self._product) for batch in matrices])
            if returning is not None:
                self._finish(*returning, skip)
            arriving, returning = after, (bucket, started)
        if returning is not None:
            self._finish(*returning, skip)

    def _start(self, bucket: _Bucket, clip: torch.Tensor | None, skip: torch.Tensor | None) -> Any:
        """Momenta of the bucket are brought up to date, and what is to be orthogonalised is on its way to the owners."""
        momentum = bucket.group["momentum"]
        gradients = clipped(gradients_of(bucket.masters, self._context), clip)
        momenta = [self._momenta[id(master)] for master in bucket.masters]
        fresh = list(torch._foreach_lerp(momenta, gradients, 1.0 - momentum))
        assign_unless(skip, momenta, fresh)
        return bucket.exchange.start_gather(torch._foreach_lerp(gradients, fresh, momentum))

    def _finish(self, bucket: _Bucket, started: Any, skip: torch.Tensor | None) -> None:
        group = bucket.group
        masters: Tensors = list(bucket.masters)
        updates: Tensors = bucket.exchange.finish_scatter(started, masters)
        torch._foreach_mul_(updates, [-group["lr"] * scale for scale in bucket.scales])
        torch._foreach_add_(updates, list(torch._foreach_mul(masters, 1.0 - group["lr"] * group["weight_decay"])))
        assign_unless(skip, masters, updates)
        self._context.updated(bucket.masters)

    def state_tensors(self) -> Iterable[StateTensor]:
        for group in self._groups:
            for master in group["params"]:
                yield StateTensor("muon.momentum", master, self._momenta[id(master)])
        yield from self._adamw.state_tensors()


def _those(split: Sequence[tuple[dict[str, Any], list[bool]]], hidden: bool) -> Groups:
    """The groups with those of their masters that are hidden matrices, or with the others; empty groups left out."""
    found = []
    for group, marks in split:
        masters = [master for master, mark in zip(group["params"], marks, strict=True) if mark is hidden]
        if masters:
            found.append({**group, "params": masters})
    return found


@dataclass(frozen=True)
class _Bucket:
    """Matrices of one group that travel together. scales: 0.2 sqrt(max(rows, columns)) of each."""

    group: dict[str, Any]
    masters: list[nn.Parameter]
    scales: list[float]
    exchange: MatrixExchange | CopyExchange


def _buckets(group: dict[str, Any], context: OptimizerContext) -> Iterable[_Bucket]:
    """The group's matrices by the axes that cut them, then in bounded buckets."""
    by_axes: defaultdict[tuple[tuple[str, ...], bool], list[nn.Parameter]] = defaultdict(list)
    for master in group["params"]:
        cut = cut_axes(master, context)
        copied = () if cut else copied_axes(master, context)
        by_axes[cut or copied, bool(copied)].append(master)
    for (axes, are_copies), masters in by_axes.items():
        kind = CopyExchange if are_copies else MatrixExchange
        num_owners = context.collectives.mesh.size(axes)
        layouts = [context.shard(master).layout for master in masters]
        shapes = [layout.shape for layout in layouts]
        owner_of = owners(shapes, num_owners)
        dtype = masters[0].dtype
        if context.device.type == "cuda" and dtype != torch.float64:
            dtype = torch.bfloat16
        for bucket in bounded_buckets(shapes, num_owners, OWNED_ELEMENTS):
            yield _Bucket(
                group,
                [masters[index] for index in bucket],
                [0.2 * math.sqrt(max(shapes[index])) for index in bucket],
                kind(
                    [layouts[index] for index in bucket],
                    [owner_of[index] for index in bucket],
                    axes,
                    context.collectives,
                    dtype,
                ),
            )


MUON = OptimizerSpec(
    "muon",
    Muon,
    state_elements=lambda config: 1,
    keys=("lr", "betas", "eps", "momentum", "weight_decay", "no_decay", "adamw_lr"),
    on_shards="aware",
)
"""state_elements: of the matrices inside blocks; what AdamW updates has two."""
