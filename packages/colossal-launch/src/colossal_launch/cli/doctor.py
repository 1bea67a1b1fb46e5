"""`colossal doctor`."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata

from colossal_launch.cli.console import say
from colossal_launch.cli.options import Debug

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "datasets", "pyarrow", "tensorboard", "matplotlib",
    "pydantic", "pluggy",
)  # fmt: skip
VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)


def doctor(debug: Debug = False) -> int:
    """Says what this machine has, what is installed, and whether two ranks can talk here. The report to send with a question.

    Examples:

        colossal doctor
    """
    del debug
    for title, lines in (
        ("machine", _machine()),
        ("packages", _packages()),
        ("environment", _environment()),
        ("two ranks", _two_ranks()),
    ):
        say(title)
        for line in lines:
            say(f"  {line}")
    return 0


def _machine() -> Iterable[str]:
    import torch

    yield f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"
    if not torch.accelerator.is_available():
        yield "no accelerator: training runs on the CPU"
        return
    kind = torch.accelerator.current_accelerator()
    yield f"{torch.accelerator.device_count()} x {kind.type if kind is not None else 'accelerator'}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.1f} GiB"


def _packages() -> Iterable[str]:
    ours = sorted(
        {found.metadata["Name"] for found in metadata.distributions() if found.metadata["Name"].startswith("colossal-")}
    )
    for name in (*ours, *PACKAGES):
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name} not installed"


def _environment() -> Iterable[str]:
    from colossal_comm.environment import read_environment

    environment = read_environment()
    yield f"launcher: {environment.launcher}, rank {environment.rank} of {environment.world_size}"
    yield from (f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    yield from (
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(("NCCL_", "COLOSSAL_", "GLOO_"))
    )


def _two_ranks() -> Iterable[str]:
    """Starts two ranks over gloo on the loopback interface and sums a number."""
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import sys, torch; from datetime import timedelta; from colossal_comm import join, leave;"
            "from colossal_core.mesh import MeshLayout, WORLD;"
            f"c = join(MeshLayout((1, 1, 2, 1, 1)), int(sys.argv[1]), torch.device('cpu'), 'file://{folder}/store', timedelta(seconds=30));"
            "x = torch.ones(1); c.start_all_reduce(x, WORLD).wait(); leave(c); sys.exit(0 if x.item() == 2 else 1)"
        )
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for rank in range(2)
        ]
        outputs = []
        for process in started:
            try:
                outputs.append(process.communicate(timeout=60)[0])
            except subprocess.TimeoutExpired:
                process.kill()
                outputs.append("no answer within 60 s")
    if all(process.returncode == 0 for process in started):
        yield "gloo on the loopback interface works"
    else:
        yield f"gloo on the loopback interface fails: {' '.join(' '.join(outputs).split())[-300:]}"
