"""Ranks that another launcher started join by its environment; a store of our own listens on the loopback interface only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("colossal_zero")

Start = Callable[..., "subprocess.Popen[str]"]


def losses(run: Path) -> list[float]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """(address in hexadecimal, port) of every listening TCP socket of these processes."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = os.readlink(link)
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


def test_a_local_run_listens_on_the_loopback_interface_only(
    project: Path,
    colossal: Start,
    steps_written: Callable[..., int],
    processes: Callable[[], list[int]],
) -> None:
    running = colossal("train", "run.yaml", "--processes", "2", "--set", "model.config.seconds=0.3")
    steps_written(2)
    found = listening(processes())
    output, errors = running.communicate(timeout=200)
    assert (running.returncode, errors) == (0, ""), output
    assert found, "a store and gloo listen somewhere"
    assert {address for address, _ in found} == {"0100007F"}, found
    assert len(losses(project / "runs/a")) == 5


def test_torchrun_slurm_and_mpi_give_the_same_run(
    project: Path, colossal: Start, left_behind: Callable[[], list[int]]
) -> None:
    """torchrun's agent serves the store; under Slurm and MPI rank 0 does, at MASTER_ADDR and MASTER_PORT."""
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        ports = [str(one.getsockname()[1]) for one in (first, second)]
    address = {"MASTER_ADDR": "127.0.0.1"}
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "localhost", **address}
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    started = []
    for rank in ("0", "1"):
        variables = {**slurm, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": ports[0]}
        words = ("train", "run.yaml", "--set", "checkpoint.directory=runs/slurm")
        started.append(colossal(*words, environment=variables))
        names = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank, "MASTER_PORT": ports[1]}
        words = ("train", "run.yaml", "--set", "checkpoint.directory=runs/mpi")
        started.append(colossal(*words, environment={**mpi, **names}))
    torchrun = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "colossal_launch", "train", "run.yaml", "--set", "checkpoint.directory=runs/torchrun"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for running in started:
        output, errors = running.communicate(timeout=200)
        assert (running.returncode, errors) == (0, ""), output
    output = torchrun.communicate(timeout=200)[0]
    assert torchrun.returncode == 0, output
    expected = losses(project / "runs/torchrun")
    assert len(expected) == 5
    assert losses(project / "runs/slurm") == expected
    assert losses(project / "runs/mpi") == expected
    assert left_behind() == []
