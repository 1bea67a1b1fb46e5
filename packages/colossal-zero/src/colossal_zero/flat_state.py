"""The parameter state of stages 0 and 1: flat buckets, reduced while the backward pass runs, gathered while the next forward pass does.

Of each bucket a rank holds a flat compute copy (the module's parameters are views of it), a flat gradient in the master dtype (the
parameters' `.grad` are views of it where dtypes agree), and its masters: all of them in stage 0, its shard in stage 1, inside the compute
copy where dtypes agree. Reductions are started in the buckets' order on every rank, whichever gradients arrive first or not at all, so
that ranks that used different parameters still meet in the same collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from colossal_core.errors import ColossalError
from colossal_core.layout import ParameterLayout, take_local
from colossal_core.shards import Shard
from colossal_zero.plan import SHARD_AXES, Bucket, bucket_shape

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives, Handle
    from colossal_core.modules import ParameterSlots
    from colossal_core.precision import Precision


class FlatBucket:
    """One bucket on this rank. sharded: stage 1 (reduce-scatter and all-gather), else stage 0 (all-reduce).

    Communication, with n ranks in `dp_shard x cp` and M bytes of gradient: stage 0 sends 2 (n-1)/n M in `start_reduce`; stage 1 sends
    (n-1)/n M there and (n-1)/n of the compute copy's bytes in `start_gather`.
    """

    def __init__(
        self,
        index: int,
        layouts: Sequence[ParameterLayout],
        slots: ParameterSlots,
        precision: Precision,
        collectives: Collectives,
        *,
        sharded: bool,
    ) -> None:
        self.index = index
        self._collectives = collectives
        self._sharded = sharded
        coordinate, device = collectives.mesh.coordinate(collectives.rank), collectives.device
        shapes = [layout.compute.local_shape(coordinate, collectives.mesh) for layout in layouts]
        self._num_shards = collectives.size(SHARD_AXES)
        self.shape = bucket_shape([math.prod(shape) for shape in shapes], self._num_shards)
        self._compute = torch.zeros(self.shape.length, dtype=precision.compute, device=device)
        self._gradient = torch.zeros(self.shape.length, dtype=precision.master, device=device)
        own = collectives.index(SHARD_AXES) if sharded else 0
        width = self.shape.shard_length if sharded else self.shape.length
        self._own = slice(own * width, (own + 1) * width)
        self._shared = precision.master == precision.compute
        compute_own = self._compute[self._own]
        self._master = compute_own if self._shared else torch.zeros(width, dtype=precision.master, device=device)
        self._pieces = [layout.compute.pieces(coordinate, collectives.mesh) for layout in layouts]
        self._gathering: Handle | None = None
        self._reducing: Handle | None = None
        self.shards = [
            self._shard(position, layout, shapes[position], slots) for position, layout in enumerate(layouts)
        ]

    def _shard(self, position: int, layout: ParameterLayout, shape: Sequence[int], slots: ParameterSlots) -> Shard:
        start, numel = self.shape.offsets[position], self.shape.numels[position]
        view = self._compute[start : start + numel].view(shape)
        parameter = slots.place(layout.full_name, view)
        if not self._sharded:
            gradient = self._gradient[start : start + numel].view(shape)
            master = parameter if self._shared else nn.Parameter(self._master[start : start + numel].view(shape))
            return Shard(layout, parameter, master, gradient)
        low, high = self.shape.held(position, self._collectives.index(SHARD_AXES))
        first = start + low - self._own.start if high > low else 0
        master = nn.Parameter(self._master[first : first + high - low])
        return Shard(layout, parameter, master, self._gradient[self._own][first : first + high - low])

    def gradient_view(self, position: int) -> torch.Tensor:
        """The whole local gradient of one parameter inside the flat buffer, in the parameter's local shape."""
        start, numel = self.shape.offsets[position], self.shape.numels[position]
        return self._gradient[start : start + numel].view_as(self.shards[position].parameter)

    def fill(self, position: int, full: torch.Tensor) -> None:
        """Sets master and compute copy of one parameter; the master from `full` itself, so that it keeps what the compute dtype drops."""
        shard = self.shards[position]
        with torch.no_grad():
            local = torch.empty(shard.parameter.shape, dtype=shard.master.dtype, device=self._compute.device)
            take_local(local, full.to(local), self._pieces[position])
            shard.parameter.copy_(local)
            if self._shared:
                return
            if self._sharded:
                low, high = self.shape.held(position, self._collectives.index(SHARD_AXES))
                shard.master.copy_(local.view(-1)[low:high])
            else:
                shard.master.copy_(local)

    def clear_gradient(self) -> None:
        self._gradient.zero_()
        if self._shared:
            for position, shard in enumerate(self.shards):
                shard.parameter.grad = self.gradient_view(position)

    def start_reduce(self) -> None:
        tag = f"gradient bucket {self.index}"
        if self._sharded:
            output = self._gradient[self._own]
            self._reducing = self._collectives.start_reduce_scatter(
                output, self._gradient, SHARD_AXES, use="reduce", tag=tag
            )
        else:
            self._reducing = self._collectives.start_all_reduce(self._gradient, SHARD_AXES, use="reduce", tag=tag)

    def wait_reduced(self) -> None:
        if self._reducing is not None:
            self._reducing.wait()
            self._reducing = None

    def start_gather(self) -> None:
        """After the optimizer: the masters go into the compute copy, and every rank's range to every rank."""
        if not self._shared:
            self._compute[self._own].copy_(self._master)
        if self._sharded and self._num_shards > 1:
            own, tag = self._compute[self._own], f"parameter bucket {self.index}"
            self._gathering = self._collectives.start_all_gather(self._compute, own, SHARD_AXES, use="gather", tag=tag)

    def wait_gathered(self) -> None:
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None


class FlatState:
    """`colossal_core.shards.ParameterState` over flat buckets. Frozen parameters are kept whole, in the compute dtype, and never sent."""

    def __init__(
        self,
        layouts: Mapping[str, ParameterLayout],
        buckets: Sequence[Bucket],
        slots: ParameterSlots,
        precision: Precision,
        collectives: Collectives,
        *,
        sharded: bool,
    ) -> None:
        coordinate = collectives.mesh.coordinate(collectives.rank)
        present = [bucket for bucket in buckets if layouts[bucket.names[0]].compute.is_present(coordinate)]
        self._buckets = [
            FlatBucket(index, [layouts[name] for name in bucket.names], slots, precision, collectives, sharded=sharded)
            for index, bucket in enumerate(present)
        ]
        self._place: dict[str, tuple[FlatBucket, int]] = {}
        self._of_unit: dict[str, list[FlatBucket]] = {}
        by_name: dict[str, Shard] = {}
        for flat, bucket in zip(self._buckets, present, strict=True):
            for position, name in enumerate(bucket.names):
                self._place[name] = (flat, position)
                by_name[name] = flat.shards[position]
                unit = self._of_unit.setdefault(layouts[name].block, [])
                if flat not in unit:
                    unit.append(flat)
        for name, layout in layouts.items():
            if not layout.trainable and layout.compute.is_present(coordinate):
                by_name[name] = _frozen(layout, slots, precision, collectives)
        self._shards = {name: by_name[name] for name in layouts if name in by_name}
        self._waiting: list[set[int]] = [set() for _ in self._buckets]
        self._next_reduce = 0
        self._is_last = False
        for name, (flat, position) in self._place.items():
            parameter = by_name[name].parameter
            parameter.register_post_accumulate_grad_hook(self._on_gradient(flat, position))  # type: ignore[no-untyped-call]

    @property
    def shards(self) -> Mapping[str, Shard]:
        return self._shards

    def fill(self, full_name: str, full: torch.Tensor) -> None:
        if full_name in self._place:
            flat, position = self._place[full_name]
            flat.fill(position, full)
        else:
            with torch.no_grad():
                self._shards[full_name].parameter.copy_(full)

    def begin_step(self) -> None:
        for bucket in self._buckets:
            bucket.clear_gradient()

    def begin_backward(self, *, last: bool) -> None:
        self._is_last = last
        self._next_reduce = 0
        for bucket in self._buckets:
            self._waiting[bucket.index] = set(range(len(bucket.shards)))

    def _on_gradient(self, bucket: FlatBucket, position: int) -> Callable[[torch.Tensor], None]:
        view = bucket.gradient_view(position)

        def arrived(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            if self._is_last and bucket.index < self._next_reduce:
                raise ColossalError(_twice(bucket.shards[position].layout.full_name))
            if gradient.is_sparse or gradient.dtype != view.dtype or gradient.data_ptr() != view.data_ptr():
                view.add_(gradient)
                parameter.grad = view if gradient.dtype == view.dtype else None
            if self._is_last:
                self._waiting[bucket.index].discard(position)
                self._start_ready()

        return arrived

    def _start_ready(self) -> None:
        while self._next_reduce < len(self._buckets) and not self._waiting[self._next_reduce]:
            self._buckets[self._next_reduce].start_reduce()
            self._next_reduce += 1

    def gather(self, block: str) -> None:
        for bucket in self._of_unit.get(block, ()):
            bucket.wait_gathered()

    def release(self, block: str) -> None:
        """The compute copy is kept for the whole step."""
        del block

    def reduce(self, block: str) -> None:
        """Buckets are reduced as they fill; a block asked for by name waits for the buckets before it."""
        for bucket in self._of_unit.get(block, ()):
            self._waiting[bucket.index].clear()
        self._start_ready()

    def finish_reduce(self) -> None:
        for waiting in self._waiting:
            waiting.clear()
        self._start_ready()
        for bucket in self._buckets:
            bucket.wait_reduced()
        self.wait_published()

    def publish(self) -> None:
        with torch.no_grad():
            for bucket in reversed(self._buckets):
                bucket.start_gather()

    def wait_published(self) -> None:
        for bucket in self._buckets:
            bucket.wait_gathered()


def _twice(full_name: str) -> str:
    return (
        f"the gradient of {full_name} came again after its reduction had started: a part of the model that runs several times is "
        "recomputed by torch.utils.checkpoint with use_reentrant=True, which adds to it each time: set use_reentrant=False"
    )


def _frozen(layout: ParameterLayout, slots: ParameterSlots, precision: Precision, collectives: Collectives) -> Shard:
    shape = layout.compute.local_shape(collectives.mesh.coordinate(collectives.rank), collectives.mesh)
    dtype = slots.dtype(layout.full_name)
    storage = torch.empty(
        shape, dtype=precision.compute if dtype.is_floating_point else dtype, device=collectives.device
    )
    parameter = slots.place(layout.full_name, storage)
    return Shard(layout, parameter, parameter)
