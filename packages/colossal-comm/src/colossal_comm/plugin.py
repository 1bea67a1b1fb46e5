"""What colossal-comm offers to core: the collectives of more than one process. Entry point `comm` of `colossal.plugins`."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from colossal_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch

    from colossal_core.collectives import Collectives
    from colossal_core.mesh import MeshLayout

COLOSSAL_PLUGIN_API = (0, 1)


@hookimpl
def colossal_connect(
    mesh: MeshLayout, rank: int, device: torch.device, store_address: str, timeout: timedelta
) -> Collectives | None:
    """Joins through torch.distributed: gloo on the CPU, NCCL on CUDA."""
    from colossal_comm.startup import join

    return join(mesh, rank, device, store_address, timeout)
