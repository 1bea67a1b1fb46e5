"""`colossal train CONFIG`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_core.errors import ConfigError, Problem
from colossal_launch.cli.console import say
from colossal_launch.cli.options import Config, Debug, Overrides, Port, Processes

if TYPE_CHECKING:
    from colossal_comm.environment import Environment
    from colossal_launch.assembly import Setup


def train(
    config: Config,
    processes: Processes = None,
    overrides: Overrides = None,
    port: Port = 0,
    debug: Debug = False,
) -> int:
    """Trains a model on text and keeps everything in the run's folder; starts again from the newest good checkpoint.

    Starts its own local workers, or joins when the environment already describes ranks (torchrun, Slurm, MPI).

    Examples:

        colossal train run.yaml --processes 2

        colossal train run.yaml --set train.num_steps=500 --set parallel.zero.stage=1

        torchrun --nproc-per-node 4 -m colossal_launch train run.yaml
    """
    from colossal_comm.environment import read_environment
    from colossal_launch.assembly import read_setup
    from colossal_launch.run.worker import run_rank

    setup = read_setup(config, overrides or [])
    environment = read_environment()
    if environment.world_size > 1:
        if processes is not None:
            reason = f"the environment already describes {environment.world_size} ranks ({environment.launcher})"
            raise ConfigError(
                [Problem("--processes", reason, "leave it out, or start without the launcher", processes)]
            )
        return _join(setup, environment)
    num_processes = local_processes(processes, setup.config.train.processes, setup.config.train.device)
    folder = _prepare(setup, num_processes, num_processes, speaks=True)
    if num_processes == 1:
        return run_rank(setup)
    from colossal_launch.run.agent import run_workers, training
    from colossal_launch.run.job import config_path

    timeout = timedelta(seconds=setup.config.train.timeout_seconds)
    return run_workers(training(config_path(folder)), num_processes, port=port, timeout=timeout)


def _join(setup: Setup, environment: Environment) -> int:
    """One rank that another launcher started. What is wrong before it joins keeps its own exit status; after, the failure is recorded."""
    from colossal_launch.run.failure import recorded
    from colossal_launch.run.worker import run_rank

    if environment.local_rank == 0:
        _prepare(setup, environment.world_size, environment.local_world_size, speaks=environment.rank == 0)
    return recorded(lambda: run_rank(setup), aloud=True)


def _prepare(setup: Setup, world_size: int, local_size: int, *, speaks: bool) -> Path:
    """Checks and prepares everything before the first worker, and prints the plan. Returns the run's folder."""
    from colossal_launch.run.job import prepare_job
    from colossal_launch.session import choose_device

    device = choose_device(setup.config.train.device, 0)
    for local_rank in range(1, local_size if device.type != "cpu" else 1):
        choose_device(setup.config.train.device, local_rank)
    job = prepare_job(setup, world_size=world_size, device_type=device.type)
    if speaks:
        text = job.text
        say(job.assembly.plan.describe())
        say(
            f"text        {text.description}: {text.train_count.num_tokens:,} tokens to train on, "
            f"{text.validation_count.num_tokens:,} held out"
        )
    return job.folder


def local_processes(asked: int | None, configured: int | None, device: str) -> int:
    """Workers to start on this host: as asked, as configured, one for each accelerator that may be used, else one."""
    import torch

    if asked or configured:
        return asked or configured or 1
    return torch.accelerator.device_count() if device != "cpu" and torch.accelerator.is_available() else 1
