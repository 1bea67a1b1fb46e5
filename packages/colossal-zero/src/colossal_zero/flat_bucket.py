"""One flat bucket on this rank: its compute copy, its masters, its gradients, and the movements between them.

The module's parameters are views of the compute copy, for good: what stage 3 frees and allocates again is the storage behind them, so that
every view that autograd has saved is valid whenever the parameters are whole. Nothing here decides when (`flat_state.py` does).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from colossal_core.layout import ParameterLayout, take_local
from colossal_core.shards import Shard
from colossal_zero.formats import Formats, shape_of
from colossal_zero.plan import SHARD_AXES

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives, Handle
    from colossal_core.modules import ParameterSlots


class FlatBucket:
    """The parameters of one bucket, trained or all of them frozen (stage 3 alone shards those).

    Kept on each of n ranks, for a flat length L: compute copy L (stage 3: only while gathered); masters L (stage 0) or L/n, none where the
    compute copy holds them; gradients L where they are added up whole, else L/n, from a step's first to the begin of the next step. In the
    second case each reduction fills a transient buffer of L in the wire dtype.

    Communication, M bytes of a flat buffer: stage 0 sends 2 (n-1)/n M in `start_reduce`, the others (n-1)/n M; `start_gather` (n-1)/n M.
    """

    def __init__(
        self,
        index: int,
        layouts: Sequence[ParameterLayout],
        slots: ParameterSlots,
        formats: Formats,
        collectives: Collectives,
        masters: torch.Tensor | None,
    ) -> None:
        """masters: of `allocate_masters`."""
        self.index = index
        self.layouts = tuple(layouts)
        self.trainable = layouts[0].trainable
        self._formats = formats
        self._collectives = collectives
        mesh = collectives.mesh
        coordinate, device = mesh.coordinate(collectives.rank), collectives.device
        self._shapes = [layout.compute.local_shape(coordinate, mesh) for layout in layouts]
        self._pieces = [layout.compute.pieces(coordinate, mesh) for layout in layouts]
        self._num_shards = collectives.size(SHARD_AXES)
        self.shape = shape_of(layouts, collectives)
        length, width = self.shape.length, self.shape.shard_length
        self._index = collectives.index(SHARD_AXES) if formats.stage else 0
        self._own = slice(self._index * width, (self._index + 1) * width) if formats.stage else slice(0, length)
        self._kept = formats.kept(self.shape)
        self._compute = torch.zeros(length, dtype=formats.compute, device=device)
        self._shared = masters is None
        self._master = self._compute[self._own] if masters is None else masters
        self._gradient = self._compute.new_zeros(0)
        if self.trainable:
            kept = length if formats.whole_gradients else self._kept
            self._gradient = torch.zeros(kept, dtype=formats.gradient, device=device)
            self._gradient.untyped_storage().resize_(0)
        self._fresh = True
        self._sent: torch.Tensor | None = None
        self._received: torch.Tensor | None = None
        self._gathering: Handle | None = None
        self._reducing: Handle | None = None
        self._whole = True
        writable = (
            self._compute.data
        )  # not the version counter of `_compute`: gathers write under what autograd has saved
        self._views = self._cut(writable)
        self.parameters = [
            slots.place(layout.full_name, view) for layout, view in zip(layouts, self._views, strict=True)
        ]
        nothing = torch.full(
            (), math.nan if formats.compute.is_floating_point else 0, dtype=formats.compute, device=device
        )
        self._absent = [nothing.expand(shape) for shape in self._shapes] if formats.stage == 3 else []
        self.shards = [self._shard(position) for position in range(len(layouts))]
        if formats.stage == 3:
            self.release()

    def _cut(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each parameter's view of a flat buffer, in its local shape."""
        places = zip(self.shape.offsets, self.shape.numels, self._shapes, strict=True)
        return [flat[start : start + numel].view(shape) for start, numel, shape in places]

    def _shard(self, position: int) -> Shard:
        layout, parameter = self.layouts[position], self.parameters[position]
        if not self._formats.stage:
            master = parameter if self._shared else nn.Parameter(self._cut(self._master)[position])
            return Shard(layout, parameter, master)
        return Shard(layout, parameter, nn.Parameter(self._master[self._held(position)], requires_grad=self.trainable))

    def _held(self, position: int) -> slice:
        """Where this rank's range of a parameter lies in its shard of the bucket."""
        low, high = self.shape.held(position, self._index)
        first = self.shape.offsets[position] + low - self._own.start if high > low else 0
        return slice(first, first + high - low)

    def _reduced(self) -> torch.Tensor:
        """This rank's range of the reduced gradients, whose memory exists from the first of a step's to the begin of the next step."""
        if not self._gradient.untyped_storage().size():
            self._gradient.untyped_storage().resize_(self._gradient.nbytes)
        return self._gradient[self._own] if self._formats.whole_gradients else self._gradient

    def positions(self, unit: str) -> list[int]:
        """Which of the parameters are the unit's."""
        return [position for position, layout in enumerate(self.layouts) if layout.block == unit]

    def fill(self, position: int, full: torch.Tensor) -> None:
        """Sets master and compute copy of one parameter; the master from `full` itself, so that it keeps what the compute dtype drops."""
        shard = self.shards[position]
        with torch.no_grad():
            # What only pads a dimension is in no piece of the parameter, and must be 0: it is computed with, and counted in norms.
            local = torch.zeros(self._shapes[position], dtype=self._master.dtype, device=self._compute.device)
            take_local(local, full.to(local), self._pieces[position])
            if self._formats.stage < 3:
                self._views[position].copy_(local)
            if not self._shared:
                low, high = self.shape.held(position, self._index)
                shard.master.copy_(local.view(-1)[low:high] if self._formats.stage else local)

    # --- parameters

    def copy_of(self, position: int) -> torch.Tensor | None:
        """Where the new values of this rank's part of a parameter go, of its master's shape. None: nowhere before `start_gather`, which in
        stage 3 makes room there; or the masters lie in the compute copy.
        """
        if self._formats.stage == 3 or self._shared:
            return None
        if not self._formats.stage:
            start, numel = self.shape.offsets[position], self.shape.numels[position]
            return self._compute[start : start + numel].view(self._shapes[position])
        return self._compute[self._own][self._held(position)]

    def start_gather(self, *, copied: bool = False) -> None:
        """The masters go into the compute copy (copied: they are there), and every rank's range to every rank. Nothing where it is whole
        (stage 3).
        """
        if self._formats.stage == 3:
            if self._whole:
                return
            self._compute.untyped_storage().resize_(self._compute.nbytes)
            for parameter, view in zip(self.parameters, self._views, strict=True):
                parameter.data = view
            self._whole = True
        own = self._compute[self._own]
        if not self._shared and not copied:
            own.copy_(self._master)
        if self._formats.stage and self._num_shards > 1:
            tag = f"parameter bucket {self.index}"
            self._gathering = self._collectives.start_all_gather(self._compute, own, SHARD_AXES, use="gather", tag=tag)

    def refresh(self, *, copied: bool) -> None:
        """`start_gather` of the masters as they are now, whatever the compute copy holds. copied: they are in this rank's range of it."""
        if self._formats.stage == 3:
            self.release()
        self.start_gather(copied=copied and self._formats.stage < 3)

    def wait_gathered(self) -> None:
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def release(self) -> None:
        """Stage 3: frees the compute copy. Parameters then read as not-a-number: a use without a gather is loud, and safe."""
        if not self._whole:
            return
        self.wait_gathered()
        for parameter, absent in zip(self.parameters, self._absent, strict=True):
            parameter.data = absent
        self._compute.untyped_storage().resize_(0)
        self._whole = False

    # --- gradients

    @property
    def sent_bytes(self) -> int:
        """Bytes of the transient buffer of one reduction."""
        return self.shape.length * self._formats.wire.itemsize

    def begin_step(self) -> None:
        """Forgets the gradients of the last step, of one that was broken off too, and frees their memory for the forward pass."""
        self.wait_reduced()
        self._sent, self._fresh = None, True
        for parameter, shard in zip(self.parameters, self.shards, strict=True):
            parameter.grad = shard.master.grad = shard.gradient = None
        self._gradient.untyped_storage().resize_(0)

    def show_gradients(self) -> None:
        """After the last reduction: every shard has its gradient."""
        reduced = self._reduced()
        for position, shard in enumerate(self.shards):
            if self._formats.stage:
                shard.gradient = reduced[self._held(position)]
            else:
                start, numel = self.shape.offsets[position], self.shape.numels[position]
                shard.gradient = reduced[start : start + numel].view(self._shapes[position])

    def take_gradients(self) -> None:
        """Moves what autograd has left into the flat buffer: into the kept one (whole gradients, or one rank), else into a transient one.

        A parameter without a gradient counts as zero.
        """
        if self._formats.whole_gradients or self._num_shards == 1:
            self._reduced()
            self._move(self._gradient, add=not self._fresh)
            self._fresh = False
            return
        self._sent = torch.empty(self.shape.length, dtype=self._formats.wire, device=self._compute.device)
        self._move(self._sent, add=False)

    def _move(self, flat: torch.Tensor, *, add: bool) -> None:
        views, gradients = self._cut(flat), [parameter.grad for parameter in self.parameters]
        dense, empty = [], []
        for view, gradient in zip(views, gradients, strict=True):
            if gradient is not None and not gradient.is_sparse:
                dense.append((view, gradient))
            elif not add:
                empty.append(view)
        with torch.no_grad():
            if dense:
                move = torch._foreach_add_ if add else torch._foreach_copy_
                move([view for view, _ in dense], [gradient for _, gradient in dense])
            if not add:
                empty += [flat[start:stop] for start, stop in self.shape.gaps]
                if empty:
                    torch._foreach_zero_(empty)
            for view, gradient in zip(views, gradients, strict=True):
                if gradient is not None and gradient.is_sparse:
                    view.add_(gradient)
        for parameter in self.parameters:
            parameter.grad = None

    def start_reduce(self) -> None:
        """After `take_gradients`. Whole gradients: once a step. Else each time, accumulating in the shard."""
        if self._num_shards == 1:
            return
        tag, wire = f"gradient bucket {self.index}", self._formats.wire
        if self._formats.whole_gradients:
            self._sent = self._gradient if wire == self._gradient.dtype else self._gradient.to(wire)
        assert self._sent is not None
        if not self._formats.stage:
            self._reducing = self._collectives.start_all_reduce(self._sent, SHARD_AXES, use="reduce", tag=tag)
            return
        self._received = self._place_received(self._sent)
        self._reducing = self._collectives.start_reduce_scatter(
            self._received, self._sent, SHARD_AXES, use="reduce", tag=tag
        )

    def _place_received(self, sent: torch.Tensor) -> torch.Tensor:
        """Where this rank's sum arrives: in the kept gradient where nothing is to be added or converted."""
        if self._formats.whole_gradients:
            return sent[self._own]
        if self._fresh and sent.dtype == self._gradient.dtype:
            return self._reduced()
        return torch.empty(self._kept, dtype=sent.dtype, device=sent.device)

    def wait_reduced(self) -> None:
        """Work that follows sees the sum; the buffer that was sent is free again."""
        if self._reducing is None:
            return
        self._reducing.wait()
        self._reducing = None
        sum_here = self._sent if self._received is None else self._received
        kept = self._reduced()
        assert sum_here is not None
        if sum_here.data_ptr() != kept.data_ptr():
            if self._formats.whole_gradients or self._fresh:
                kept.copy_(sum_here)
            else:
                kept.add_(sum_here)
        if not self._formats.whole_gradients:
            self._fresh = False
        self._sent = self._received = None
