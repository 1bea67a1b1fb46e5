"""Every launcher's variables, and what is said when they do not fit together."""

from __future__ import annotations

import pytest

from colossal_comm import Environment, read_environment
from colossal_comm.environment import expand_hosts
from colossal_core.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29501",
}


def test_nobody_is_one_process() -> None:
    assert read_environment({"HOME": "/root"}) == Environment("single", 0, 1, 0, 1, "")


def test_torchrun() -> None:
    assert read_environment(TORCHRUN) == Environment("torchrun", 5, 8, 1, 4, "tcp://node1:29501")
    agent = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert read_environment(agent).store_address == "tcp://node1:29501?hosted&prefix=attempt_2"
    alone = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert read_environment(alone) == Environment("torchrun", 0, 1, 0, 1, "")
    assert read_environment({**TORCHRUN, "MASTER_ADDR": "fe80::1"}).store_address == "tcp://[fe80::1]:29501"


def test_slurm() -> None:
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "16",
        "SLURM_LOCALID": "3",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_JOB_NODELIST": "gpu[07-08,11],login1",
        "SLURM_JOB_ID": "123456",
    }
    assert read_environment(slurm) == Environment("slurm", 3, 16, 3, 8, "tcp://gpu07:18456")
    assert read_environment({**slurm, **TORCHRUN}).launcher == "torchrun"
    chosen = {**slurm, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7000"}
    assert read_environment(chosen).store_address == "tcp://10.0.0.1:7000"


def test_mpi() -> None:
    open_mpi = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    assert read_environment(open_mpi) == Environment("mpi", 1, 2, 1, 2, "tcp://127.0.0.1:29500")
    assert read_environment({"PMI_RANK": "0", "PMI_SIZE": "4", "MASTER_ADDR": "a"}) == Environment(
        "mpi", 0, 4, 0, 4, "tcp://a:29500"
    )


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("a", ["a"]),
        ("a,b-1", ["a", "b-1"]),
        ("n[1-3,8]", ["n1", "n2", "n3", "n8"]),
        ("r[1-2]n[09-10].ib,x", ["r1n09.ib", "r1n10.ib", "r2n09.ib", "r2n10.ib", "x"]),
        ("n[1-", []),
        ("n[a-b]", []),
    ],
)
def test_host_lists(nodes: str, hosts: list[str]) -> None:
    assert expand_hosts(nodes) == hosts


def problems(environ: dict[str, str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_environment(environ)
    return str(caught.value).splitlines()


def test_everything_that_is_wrong_is_said_at_once() -> None:
    assert problems({"WORLD_SIZE": "two"}) == [
        "RANK: not set, though the other variables of this launcher are: set it, or unset the others",
        "WORLD_SIZE='two': not a whole number: let the launcher set it, or unset it",
        "LOCAL_RANK: not set, though the other variables of this launcher are: set it, or unset the others",
        "LOCAL_WORLD_SIZE: not set, though the other variables of this launcher are: set it, or unset the others",
        "MASTER_ADDR: not set: set it to the host of rank 0, as the other hosts know it",
        "MASTER_PORT: not set: set it to a free port of the host of rank 0",
    ]
    assert problems({**TORCHRUN, "RANK": "8", "LOCAL_RANK": "4", "MASTER_PORT": "0"}) == [
        "RANK=8: not below WORLD_SIZE=8: start 8 processes with ranks from 0 to 7",
        "LOCAL_RANK=4: not below the number of processes on this host, 4: check LOCAL_RANK and LOCAL_WORLD_SIZE",
        "MASTER_PORT='0': not a port: choose a free one between 1024 and 65535",
    ]
    assert problems({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) == [
        "SLURM_JOB_NODELIST: not set: start with srun, or set MASTER_ADDR"
    ]
