"""Which rank this process is, as its launcher says: torchrun, Slurm's srun, an MPI starter, or nobody (one process).

Only read, never written: no environment variable is set here.

- torchrun: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
- mpi: OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE; else PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS. The store stands at
  MASTER_ADDR, which may be left out on one host.
- slurm: SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_NTASKS_PER_NODE. The store stands on the first host of SLURM_JOB_NODELIST.

They are looked at in this order, so `srun torchrun` is torchrun. MASTER_ADDR and MASTER_PORT win where they are set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from colossal_core.errors import Problem, raise_problems

Launcher = Literal["torchrun", "mpi", "slurm", "single"]
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Environment:
    """One process among `world_size`. store_address: for `join`; empty for one process."""

    launcher: Launcher = "single"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    store_address: str = ""


@dataclass(frozen=True)
class _Names:
    """The variables of one launcher. Only rank and size must be there."""

    launcher: Launcher
    rank: str
    size: str
    local_rank: str
    local_size: str


_LAUNCHERS = (
    _Names("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    _Names(
        "mpi",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Names("mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Names("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


def read_environment(environ: Mapping[str, str] | None = None) -> Environment:
    """What the environment says. environ: None reads this process's. Raises ConfigError with everything that is inconsistent."""
    values = os.environ if environ is None else environ
    for names in _LAUNCHERS:
        if names.rank in values or (names.size in values and names.launcher == "torchrun"):
            return _read(values, names)
    return Environment()


def _read(values: Mapping[str, str], names: _Names) -> Environment:
    problems: list[Problem] = []
    rank = _number(values, names.rank, problems)
    size = _number(values, names.size, problems)
    local_rank = _number(values, names.local_rank, problems, default=rank)
    local_size = _number(values, names.local_size, problems, default=size)
    if size is not None and size < 1:
        problems.append(Problem(names.size, "fewer than one process", "let the launcher set it, or unset it", size))
    elif rank is not None and size is not None and rank >= size:
        reason = f"not below {names.size}={size}"
        problems.append(Problem(names.rank, reason, f"start {size} processes with ranks from 0 to {size - 1}", rank))
    if local_rank is not None and local_size is not None and local_rank >= local_size and local_size >= 1:
        reason = f"not below the number of processes on this host, {local_size}"
        problems.append(
            Problem(names.local_rank, reason, f"check {names.local_rank} and {names.local_size}", local_rank)
        )
    if local_size is not None and size is not None and local_size > size >= 1:
        problems.append(
            Problem(names.local_size, f"above {names.size}={size}", f"check {names.local_size}", local_size)
        )
    address = "" if size == 1 else _address(values, names.launcher, size, local_size, problems)
    raise_problems(problems)
    assert rank is not None and size is not None and local_rank is not None and local_size is not None
    return Environment(names.launcher, rank, size, local_rank, local_size, address)


def _number(values: Mapping[str, str], name: str, problems: list[Problem], default: int | None = None) -> int | None:
    if name not in values:
        if default is None:
            problems.append(
                Problem(name, "not set, though the other variables of this launcher are", "set it, or unset the others")
            )
        return default
    if not re.fullmatch(r"[0-9]+", values[name]):
        problems.append(Problem(name, "not a whole number", "let the launcher set it, or unset it", values[name]))
        return None
    return int(values[name])


def _address(
    values: Mapping[str, str], launcher: Launcher, size: int | None, local_size: int | None, problems: list[Problem]
) -> str:
    host = values.get("MASTER_ADDR", "")
    if not host and launcher == "slurm":
        host = _first_slurm_host(values, problems)
    elif not host and launcher == "mpi" and size == local_size:
        host = "127.0.0.1"
    elif not host:
        problems.append(Problem("MASTER_ADDR", "not set", "set it to the host of rank 0, as the other hosts know it"))
    port = _port(values, launcher, problems)
    host = f"[{host}]" if ":" in host else host
    # torchrun's agent already serves a store there; a restarted group must not read what the last one wrote.
    hosted = "?hosted" if values.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else ""
    restarts = values.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"&prefix=attempt_{restarts}" if hosted else ""
    return f"tcp://{host}:{port}{hosted}{prefix}"


def _port(values: Mapping[str, str], launcher: Launcher, problems: list[Problem]) -> int:
    text = values.get("MASTER_PORT", "")
    if not text and launcher == "torchrun":
        problems.append(Problem("MASTER_PORT", "not set", "set it to a free port of the host of rank 0"))
    elif text and (not re.fullmatch(r"[0-9]+", text) or not 1 <= int(text) <= 65535):
        problems.append(Problem("MASTER_PORT", "not a port", "choose a free one between 1024 and 65535", text))
    elif text:
        return int(text)
    job = values.get("SLURM_JOB_ID", "")
    # Jobs that share a host must not share a port, and all ranks of a job must agree on one.
    return 15000 + int(job) % 20000 if launcher == "slurm" and job.isdigit() else DEFAULT_PORT


def _first_slurm_host(values: Mapping[str, str], problems: list[Problem]) -> str:
    nodes = values.get("SLURM_STEP_NODELIST") or values.get("SLURM_JOB_NODELIST") or values.get("SLURM_NODELIST", "")
    if not nodes:
        problems.append(Problem("SLURM_JOB_NODELIST", "not set", "start with srun, or set MASTER_ADDR"))
        return ""
    hosts = expand_hosts(nodes)
    if not hosts:
        problems.append(Problem("SLURM_JOB_NODELIST", "not a list of hosts", "set MASTER_ADDR", nodes))
        return ""
    return hosts[0]


def expand_hosts(nodes: str) -> list[str]:
    """Slurm's host list in full: `a[01-03,7]-ib,b` is a01-ib, a02-ib, a03-ib, a7-ib, b. Empty when it cannot be read."""
    hosts: list[str] = []
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodes)
    if ",".join(parts) != nodes:
        return []
    for part in parts:
        expanded = _expand_one(part.strip())
        if expanded is None:
            return []
        hosts += expanded
    return hosts


def _expand_one(text: str) -> list[str] | None:
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]+)\](.*)", text)
    if match is None:
        return [text] if text and "[" not in text and "]" not in text else None
    head, ranges, tail = match.groups()
    rest = _expand_one(tail) if tail else [""]
    if rest is None:
        return None
    found: list[str] = []
    for item in ranges.split(","):
        bounds = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", item.strip())
        if bounds is None:
            return None
        first, last = bounds[1], bounds[2] or bounds[1]
        width = len(first)
        found += [f"{head}{number:0{width}d}{ending}" for number in range(int(first), int(last) + 1) for ending in rest]
    return found
