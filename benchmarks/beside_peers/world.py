"""The ranks that measure, and how they are arranged for torch's own strategies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class World:
    """This process's rank and device. meshes: those made so far, by the number of tensor ranks; communicators are kept between rows."""

    rank: int
    size: int
    device: torch.device
    meshes: dict[int, DeviceMesh] = field(default_factory=dict)

    def mesh(self, tensor_size: int = 1) -> DeviceMesh:
        """Dimensions `data` and `tensor`, tensor ranks next to one another, as the library has them. Every rank asks for it alike."""
        from torch.distributed.device_mesh import init_device_mesh

        if tensor_size not in self.meshes:
            sizes = (self.size // tensor_size, tensor_size)
            self.meshes[tensor_size] = init_device_mesh(self.device.type, sizes, mesh_dim_names=("data", "tensor"))
        return self.meshes[tensor_size]


def join() -> World:
    """The group that the library joins serves the peers too; for one process it makes none, and they get one here."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from colossal_launch import launch

    ranks = launch()
    if not dist.is_initialized():
        backend = dist.get_default_backend_for_device(ranks.device)
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return World(ranks.rank, ranks.world_size, ranks.device)
