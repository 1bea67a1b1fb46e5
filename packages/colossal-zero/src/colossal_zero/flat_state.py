"""The parameter state of every stage: when each flat bucket is gathered, released and reduced, and in which order.

Reductions are started in one order on every rank (`reduction_order.py`), whichever gradients arrive first or not at all, so that ranks
that used different parameters still meet in the same collective.

In a pipeline a backward pass brings the gradients of one stage's units and leaves the buckets of other stages alone. A unit that two stages
of one rank use (tied ends of a V) has had its last gradients when both stages have.

Stage 3 gathers between reductions, and a rank that waits for a reduction which another one starts only after the next gather would wait for
ever. So there reductions start at points that all ranks have in common: where a unit is closed, and at the end of a backward pass. What was
complete on every rank in every backward pass of the first step may start at once from then on.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from colossal_core.errors import ColossalError
from colossal_core.layout import ParameterLayout, take_local
from colossal_core.shards import Shard
from colossal_zero.flat_bucket import FlatBucket
from colossal_zero.formats import Formats, allocate_masters
from colossal_zero.plan import Bucket, most_in_flight
from colossal_zero.publication import Publication
from colossal_zero.reduction_order import ReductionOrder

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.collectives import Collectives
    from colossal_core.modules import ParameterSlots
    from colossal_core.plan import Gathering


class FlatState:
    """`colossal_core.shards.ParameterState` over flat buckets. early: units that the next forward pass can have gathered for it while the
    optimizer updates others, in the order in which it asks for them. stages: the units of each pipeline stage of this rank; none without
    a pipeline.

    Stages 0 to 2 of ZeRO keep frozen parameters as the forward pass sees them, in the compute dtype, and never send them.
    """

    def __init__(
        self,
        layouts: Mapping[str, ParameterLayout],
        buckets: Sequence[Bucket],
        slots: ParameterSlots,
        formats: Formats,
        collectives: Collectives,
        gathering: Gathering,
        early: Sequence[str],
        stages: Sequence[Sequence[str]] = (),
    ) -> None:
        self._collectives = collectives
        self._stage = formats.stage
        self._whole_gradients = formats.whole_gradients
        self._keeps_for_step = gathering.keep == "step"
        coordinate = collectives.mesh.coordinate(collectives.rank)
        present = [bucket for bucket in buckets if layouts[bucket.names[0]].compute.is_present(coordinate)]
        members = [[layouts[name] for name in bucket.names] for bucket in present]
        masters = allocate_masters(members, formats, collectives)
        self._buckets = [
            FlatBucket(index, held, slots, formats, collectives, own)
            for index, (held, own) in enumerate(zip(members, masters, strict=True))
        ]
        self._trained = [bucket for bucket in self._buckets if bucket.trainable]
        self._place = {
            layout.full_name: (bucket, position)
            for bucket in self._buckets
            for position, layout in enumerate(bucket.layouts)
        }
        self._place_of_master = {
            id(bucket.shards[position].master): (bucket, position) for bucket, position in self._place.values()
        }
        self._of_unit: dict[str, list[FlatBucket]] = {}
        for bucket in self._buckets:
            for unit in dict.fromkeys(layout.block for layout in bucket.layouts):
                self._of_unit.setdefault(unit, []).append(bucket)
        in_order = [bucket for unit in early for bucket in self._of_unit.get(unit, ())]
        self._publication = Publication(list(dict.fromkeys(in_order)))
        self._shards = {
            name: self._shard(layout, slots, formats, collectives)
            for name, layout in layouts.items()
            if layout.compute.is_present(coordinate)
        }
        uses = Counter(unit for stage in stages for unit in set(stage))
        self._closings = {unit: max(uses[unit], 1) for unit in self._of_unit}
        self._left = dict(self._closings)
        self._order = ReductionOrder(collectives)
        self._next = 0
        self._opened: frozenset[str] | None = None
        self._waiting: dict[int, set[int]] = {}
        self._started: set[int] = set()
        self._reduced: set[int] = set()
        self._in_flight: deque[FlatBucket] = deque()
        self._most_in_flight = most_in_flight([bucket.sent_bytes for bucket in self._trained])
        self._is_last = True
        self._users: dict[int, set[str]] = {bucket.index: set() for bucket in self._buckets}
        for bucket in self._trained:
            for position, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(self._on_gradient(bucket, position))  # type: ignore[no-untyped-call]

    def _shard(
        self, layout: ParameterLayout, slots: ParameterSlots, formats: Formats, collectives: Collectives
    ) -> Shard:
        if layout.full_name in self._place:
            bucket, position = self._place[layout.full_name]
            return bucket.shards[position]
        return _kept_whole(layout, slots, formats, collectives)

    @property
    def shards(self) -> Mapping[str, Shard]:
        return self._shards

    def fill(self, full_name: str, full: torch.Tensor) -> None:
        if full_name in self._place:
            bucket, position = self._place[full_name]
            bucket.fill(position, full)
        elif full_name in self._shards:
            shard, mesh = self._shards[full_name], self._collectives.mesh
            with torch.no_grad():
                pieces = shard.layout.compute.pieces(mesh.coordinate(self._collectives.rank), mesh)
                take_local(shard.parameter, full, pieces)

    # --- parameters

    def prefetch(self, unit: str) -> None:
        if self._stage == 3:
            for bucket in self._of_unit.get(unit, ()):
                self._users[bucket.index].add(unit)
                bucket.start_gather()

    def gather(self, unit: str) -> None:
        self.prefetch(unit)
        for bucket in self._of_unit.get(unit, ()):
            bucket.wait_gathered()

    def release(self, unit: str) -> None:
        """Stage 3 frees the compute copy, unless it is kept for the whole step and the step is not at its end. A bucket that several
        modules outside the blocks share is freed when the last of them is released.
        """
        if self._stage == 3 and not self._is_kept():
            for bucket in self._of_unit.get(unit, ()):
                self._users[bucket.index].discard(unit)
                if not self._users[bucket.index]:
                    bucket.release()

    def _free(self, buckets: Sequence[FlatBucket], kept: Sequence[FlatBucket] = ()) -> None:
        for bucket in buckets:
            self._users[bucket.index].clear()
            if bucket not in kept:
                bucket.release()

    def _is_kept(self) -> bool:
        return self._keeps_for_step and not self._is_last

    def copies(self, masters: Sequence[nn.Parameter]) -> list[torch.Tensor] | None:
        places = [self._place_of_master[id(master)] for master in masters]
        found = [copy for bucket, position in places if (copy := bucket.copy_of(position)) is not None]
        if not found or len(found) < len(masters):
            return None
        self._publication.copied(masters)
        return found

    def updated(self, masters: Sequence[nn.Parameter]) -> None:
        self._publication.updated(masters)

    def publish(self) -> None:
        """Stages 0 to 2 refresh what is left of the compute copy. Stage 3 leaves whole what it has gathered while the optimizer was
        running, frees everything else, and gathers that when it is used.

        What stays does not raise the peak: the same units were whole at the end of the backward pass, beside the same states and
        gradients and the buffers in which embeddings' gradients were sent. (In place of those Muon has buffers of its own, up to about
        1.3 GB.) And the peak is higher yet, at the loss, where these units are whole too, beside all activations.
        """
        if self._stage == 3:
            self._free(self._buckets, kept=self._publication.refreshed)
            self._publication.begin()
        else:
            self._publication.finish()

    def wait_published(self) -> None:
        """From here on masters may change in any way (an optimizer, a checkpoint): nothing counts as refreshed that was so before."""
        for bucket in self._buckets:
            bucket.wait_gathered()
        self._publication.begin()

    # --- gradients

    def begin_step(self) -> None:
        """A step that an exception has ended leaves reductions on their way, which are waited for and forgotten."""
        self._is_last = False
        self._opened, self._waiting = None, {}
        self._left = dict(self._closings)
        self._in_flight.clear()
        self._reduced.clear()
        for bucket in self._trained:
            bucket.begin_step()

    def begin_backward(self, *, last: bool, units: Collection[str] | None = None) -> None:
        self._opened = frozenset(self._of_unit if units is None else (unit for unit in units if unit in self._of_unit))
        for unit in self._opened:
            assert units is None or self._left[unit], f"{unit} has had its last gradients of this step"
            if last:
                self._left[unit] = 0 if units is None else self._left[unit] - 1
        self._is_last = not any(self._left.values())
        self._waiting = {}
        for bucket in self._trained:
            positions = {index for index, layout in enumerate(bucket.layouts) if layout.block in self._opened}
            if positions:
                self._waiting[bucket.index] = positions
        self._order.begin(list(self._waiting))
        self._next = 0
        self._started.clear()

    def _on_gradient(self, bucket: FlatBucket, position: int) -> Callable[[torch.Tensor], None]:
        layout = bucket.layouts[position]

        def arrived(parameter: torch.Tensor) -> None:
            del parameter
            if self._opened is None:
                return  # a backward pass that is not a step's
            assert layout.block in self._opened, f"the gradient of {layout.full_name} in a backward pass of other units"
            waiting = self._waiting[bucket.index]
            if position not in waiting:
                raise ColossalError(_twice(layout.full_name, self._stage))
            waiting.discard(position)
            if not waiting:
                self._complete(bucket)

        return arrived

    def _complete(self, bucket: FlatBucket) -> None:
        """All of a bucket's gradients are there. What is kept whole is added up at once; reductions wait for their turn."""
        self._order.complete(bucket.index)
        if self._whole_gradients:
            bucket.take_gradients()
        if self._is_learning():
            return
        order = self._order.current
        while self._next < len(order) and not self._waiting[order[self._next]]:
            if order[self._next] in self._order.late:
                break
            self._start(self._buckets[order[self._next]])
            self._next += 1

    def _is_learning(self) -> bool:
        return self._stage == 3 and self._order.is_learning

    def _is_closed(self, bucket: FlatBucket) -> bool:
        """Whether the step brings no further gradients after the running backward pass."""
        return not any(self._left[layout.block] for layout in bucket.layouts)

    def _start(self, bucket: FlatBucket) -> None:
        """Starts the reduction of a complete bucket, once in each backward pass; of whole gradients only in the last one."""
        if bucket.index in self._started:
            return
        self._started.add(bucket.index)
        if not self._whole_gradients:
            while self._in_flight and self._has_no_room_for(bucket):
                self._in_flight.popleft().wait_reduced()
            bucket.take_gradients()
            self._reduce(bucket)
            self._in_flight.append(bucket)
        elif self._is_closed(bucket):
            self._reduce(bucket)

    def _reduce(self, bucket: FlatBucket) -> None:
        self._reduced.add(bucket.index)
        bucket.start_reduce()

    def _has_no_room_for(self, bucket: FlatBucket) -> bool:
        used = sum(other.sent_bytes for other in self._in_flight)
        return bucket in self._in_flight or used + bucket.sent_bytes > self._most_in_flight

    def reduce(self, unit: str) -> None:
        """Of a unit asked for by name what has not arrived never will. Its bucket still waits for its turn: on another rank all of the
        unit's gradients may have arrived, and the order be kept by that. Nothing in a backward pass that is not a step's.
        """
        for bucket in self._of_unit.get(unit, ()):
            waiting = self._waiting.get(bucket.index)
            if waiting is None:
                continue
            if waiting:
                waiting.difference_update(bucket.positions(unit))
                if not waiting:
                    self._complete(bucket)
            else:
                late = bucket.index in self._started and any(p.grad is not None for p in bucket.parameters)
                assert not late, f"{unit} is reduced twice between begin_backward and end_backward"
            if self._waiting[bucket.index]:
                continue  # another unit of the bucket is still open
            if self._is_learning():
                self._start(bucket)
            elif self._stage == 3 and bucket.index not in self._started | self._order.late:
                stalled = self._buckets[self._order.current[self._next]]
                position = min(self._waiting[stalled.index])
                raise ColossalError(_missing(stalled.layouts[position].full_name))

    def end_backward(self) -> None:
        assert self._opened is not None, "no backward pass has begun"
        for index in self._order.current:
            bucket = self._buckets[index]
            if self._waiting[index]:
                self._waiting[index].clear()
                self._order.incomplete(index)
                if self._whole_gradients:
                    bucket.take_gradients()
            self._start(bucket)
        if self._stage == 3 and not self._is_kept():
            units = self._of_unit if self._is_last else self._opened
            self._free([bucket for unit in units for bucket in self._of_unit[unit]])
        self._opened, self._waiting = None, {}

    def finish_reduce(self) -> None:
        """What no backward pass has brought, or none has brought for the last time, is reduced here: zeros where nothing came."""
        for bucket in self._trained:
            if bucket.index not in self._reduced:
                bucket.take_gradients()
                self._reduce(bucket)
            bucket.wait_reduced()
            bucket.show_gradients()
        self._in_flight.clear()
        self._is_last = True
        if self._stage == 3:
            self._free(self._buckets)
        self.wait_published()
        self._order.agree()


def _twice(full_name: str, stage: int) -> str:
    found = (
        f"the gradient of {full_name} came twice in one backward pass: a part of the model that runs several times is recomputed by "
        "torch.utils.checkpoint with use_reentrant=True, which adds to it each time: set use_reentrant=False"
    )
    if stage < 3:
        return found
    return (
        f"{found}; or the model ran several times before one backward pass (a loss_fn that calls it again), while stage 3 "
        "reduces a block when its backward pass ends: use parallel.zero.stage: 2"
    )


def _missing(full_name: str) -> str:
    return (
        f"the gradient of {full_name} has not arrived where it did in the first step: a module outside every block is used in some "
        "microbatches only, on which the ranks cannot agree under stage 3: use parallel.zero.stage: 2"
    )


def _kept_whole(layout: ParameterLayout, slots: ParameterSlots, formats: Formats, collectives: Collectives) -> Shard:
    shape = layout.compute.local_shape(collectives.mesh.coordinate(collectives.rank), collectives.mesh)
    dtype = slots.dtype(layout.full_name)
    storage = torch.zeros(shape, dtype=formats.compute if dtype.is_floating_point else dtype, device=collectives.device)
    parameter = slots.place(layout.full_name, storage)
    return Shard(layout, parameter, parameter)
