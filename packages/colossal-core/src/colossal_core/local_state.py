"""The parameter state that shards nothing by itself and sends nothing: what a strategy has cut stays cut as it is, masters like compute
copies. On one process it is the oracle that every other state is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from colossal_core.layout import take_local
from colossal_core.modules import ParameterSlots
from colossal_core.shards import Shard

if TYPE_CHECKING:
    from colossal_core.layout import ParameterLayout, Piece
    from colossal_core.mesh import MeshLayout
    from colossal_core.precision import Precision


class LocalState:
    """Masters are the parameters themselves where compute and master dtype agree, else copies in the master dtype.

    Gradients accumulate over microbatches in the gradient dtype: by autograd where that is the compute dtype, else by a hook. Their memory
    is there from the first of a step's to the begin of the next step. Tensors have this rank's shape in the compute placement (which the
    state placement must agree with but for what is partial): `coordinate` on `mesh`. Elements that only pad a dimension are 0. Parameters
    that are not present there are left out, and whatever the module holds in their place is left alone.
    """

    def __init__(
        self,
        slots: ParameterSlots,
        layouts: Mapping[str, ParameterLayout],
        precision: Precision,
        device: torch.device,
        mesh: MeshLayout,
        coordinate: Mapping[str, int],
    ) -> None:
        self._shards: dict[str, Shard] = {}
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self._precision = precision
        for name, layout in layouts.items():
            if not layout.compute.is_present(coordinate):
                continue
            assert layout.state.cuts == layout.compute.cuts and layout.state.flat is None, f"{name} is sharded"
            shape = layout.compute.local_shape(coordinate, mesh)
            self._pieces[name] = layout.compute.pieces(coordinate, mesh)
            dtype = precision.compute if layout.trainable or slots.dtype(name).is_floating_point else slots.dtype(name)
            parameter = slots.place(name, torch.zeros(shape, dtype=dtype, device=device))
            master = parameter
            if layout.trainable and precision.master != precision.compute:
                master = nn.Parameter(torch.zeros(shape, dtype=precision.master, device=device))
            if layout.trainable and precision.gradient != precision.compute:
                parameter.register_post_accumulate_grad_hook(self._accumulate(name))  # type: ignore[no-untyped-call]
            self._shards[name] = Shard(layout, parameter, master)

    def _accumulate(self, name: str) -> Callable[[torch.Tensor], None]:
        def add_to_master_gradient(parameter: torch.Tensor) -> None:
            shard = self._shards[name]
            assert parameter.grad is not None
            if shard.gradient is None:
                shard.gradient = torch.zeros_like(parameter, dtype=self._precision.gradient)
            shard.gradient.add_(parameter.grad)
            parameter.grad = None

        return add_to_master_gradient

    @property
    def shards(self) -> Mapping[str, Shard]:
        return self._shards

    def fill(self, full_name: str, full: torch.Tensor) -> None:
        if full_name not in self._shards:
            return
        shard, pieces = self._shards[full_name], self._pieces[full_name]
        with torch.no_grad():
            take_local(shard.master, full, pieces)
            if shard.master is not shard.parameter:
                take_local(shard.parameter, full, pieces)

    def begin_step(self) -> None:
        for shard in self._shards.values():
            shard.gradient = shard.parameter.grad = shard.master.grad = None

    def begin_backward(self, *, last: bool, units: Collection[str] | None = None) -> None:
        del last, units

    def prefetch(self, unit: str) -> None:
        del unit

    def gather(self, unit: str) -> None:
        del unit

    def release(self, unit: str) -> None:
        del unit

    def reduce(self, unit: str) -> None:
        del unit

    def end_backward(self) -> None:
        return None

    def finish_reduce(self) -> None:
        for shard in self._shards.values():
            if not shard.layout.trainable or shard.gradient is not None:
                continue
            gradient = shard.parameter.grad
            if gradient is None:
                shard.gradient = torch.zeros_like(shard.parameter, dtype=self._precision.gradient)
            else:
                shard.gradient = gradient.to_dense() if gradient.is_sparse else gradient

    def copies(self, masters: Sequence[nn.Parameter]) -> list[torch.Tensor] | None:
        del masters
        return None

    def updated(self, masters: Sequence[nn.Parameter]) -> None:
        del masters

    def publish(self) -> None:
        pairs = [shard for shard in self._shards.values() if shard.master is not shard.parameter]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_([shard.parameter for shard in pairs], [shard.master for shard in pairs])

    def wait_published(self) -> None:
        return None
