"""Joining the group that the environment describes, and leaving it. A process belongs to at most one group, as in torch.distributed."""

from __future__ import annotations

import atexit
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from colossal_core.errors import ConfigError, Problem

if TYPE_CHECKING:
    import torch

    from colossal_comm.collectives import RankCollectives
    from colossal_core.mesh import MeshLayout

DEFAULT_TIMEOUT = timedelta(minutes=3)


@dataclass
class _Joined:
    """The one process-wide object of this package: what `launch` joined. A group belongs to a process whether we record it or not."""

    collectives: RankCollectives | None = None


_joined = _Joined()


@dataclass(frozen=True)
class Ranks:
    """The group as one rank sees it. local_rank: place on this host."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def launch(device: str = "auto", timeout: timedelta = DEFAULT_TIMEOUT) -> Ranks:
    """Joins the group that the environment describes (torchrun, Slurm, MPI), or stands alone where it describes none.

    device: `auto` (the accelerator that torch finds, else the CPU), `cpu` or `cuda`. timeout: of joining and of every collective.
    Calling it again returns the same group, with the timeout that it has. The group is left at exit.

    Raises: ConfigError for an inconsistent environment or a device that is not there, CommunicationError when other ranks do not come.
    """
    from colossal_comm.environment import read_environment
    from colossal_comm.startup import join
    from colossal_core.mesh import MeshLayout

    environment = read_environment()
    chosen = choose_device(device, environment.local_rank)
    if _joined.collectives is None:
        flat = MeshLayout((1, 1, environment.world_size, 1, 1))
        _joined.collectives = join(flat, environment.rank, chosen, environment.store_address, timeout)
        atexit.register(finish)
    joined = _joined.collectives
    if device != "auto" and joined.device.type != chosen.type:
        reason = f"this process has joined its group on {joined.device.type} already"
        raise ConfigError([Problem("launch", reason, "call launch once, or with the same device", device)])
    return Ranks(joined.rank, joined.mesh.world_size, environment.local_rank, joined.device)


def finish(grace: timedelta = timedelta(seconds=5)) -> None:
    """Leaves the group, if there is one. No thread, socket or process is left behind."""
    from colossal_comm.startup import leave

    if _joined.collectives is not None:
        leave(_joined.collectives, grace=grace)
        _joined.collectives = None


def collectives_for(mesh: MeshLayout, device: torch.device) -> RankCollectives:
    """The joined group seen through a plan's mesh; one process alone where nothing was joined.

    Raises: ConfigError when the mesh has another number of ranks than the group, or the environment describes ranks and nobody joined.
    """
    from colossal_comm.environment import read_environment
    from colossal_comm.startup import join
    from colossal_core.mesh import MeshLayout as Mesh

    if _joined.collectives is None:
        environment = read_environment()
        if environment.world_size > 1:
            reason = f"the environment describes {environment.world_size} ranks ({environment.launcher}), and none has joined"
            raise ConfigError(
                [Problem("launch", reason, "call colossal_launch.launch() before Booster, in every process")]
            )
        _joined.collectives = join(Mesh(), 0, device, "", DEFAULT_TIMEOUT)
        atexit.register(finish)
    joined = _joined.collectives
    if joined.mesh.world_size != mesh.world_size:
        reason = f"the plan is for {mesh.world_size} ranks and the group has {joined.mesh.world_size}"
        raise ConfigError(
            [Problem("parallel", reason, "call colossal_launch.launch() before Booster, in every process")]
        )
    return joined.with_mesh(mesh)


def world_size() -> int:
    """Ranks of the joined group; 1 where nothing was joined."""
    return _joined.collectives.mesh.world_size if _joined.collectives is not None else 1


def joined_device() -> torch.device | None:
    """The device of the joined group, or None."""
    return _joined.collectives.device if _joined.collectives is not None else None


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device of a local rank.

    Raises: ConfigError when the accelerator asked for is not there, or has fewer devices than local ranks.
    """
    import torch

    available = torch.accelerator.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator() if available else None
    if found is None or (name != "auto" and found.type != name):
        has = found.type if found is not None else "only a CPU"
        raise ConfigError(
            [Problem("train.device", f"torch finds {has}", "use auto or cpu, or install torch for it", name)]
        )
    count = torch.accelerator.device_count()
    if local_rank >= count:
        reason = f"local rank {local_rank} has no device of its own: this host has {count}"
        raise ConfigError(
            [Problem("--processes", reason, f"start at most {count} processes here, or set train.device: cpu")]
        )
    return torch.device(found.type, local_rank)


def rank() -> int:
    """This process's rank in the joined group; 0 where nothing was joined."""
    return _joined.collectives.rank if _joined.collectives is not None else 0
