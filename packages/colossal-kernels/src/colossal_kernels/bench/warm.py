"""`python -m colossal_kernels.bench.warm [OPS]` compiles what the benchmark will call, by several processes at once, into the caches of
Triton and of inductor on the disk: on a machine of many cores the benchmark then takes a fraction of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys

import torch

from colossal_core.benchmarks import BenchmarkRequest
from colossal_core.errors import ConfigError
from colossal_kernels._torch_private import backward_that_can_run_again
from colossal_kernels.bench.case import Draw, OpBench, Shape
from colossal_kernels.bench.command import available, chosen, require_something
from colossal_kernels.bench.measure import contestants
from colossal_kernels.bench.outcome import copied, outcome


def call_once(bench: OpBench, shape: Shape, wanted: tuple[str, ...], device: torch.device) -> None:
    """Every contestant, forward and backward. What fails here fails in the benchmark too, which says so."""
    ours = [entry for entry in available(device.type) if entry.op == bench.op]
    with contextlib.suppress(Exception):
        call = shape.call(Draw(device))
        for contestant in contestants(bench, ours, device.type, wanted):
            again = backward_that_can_run_again() if "backward" in shape.least else contextlib.nullcontext()
            with contextlib.suppress(Exception), again:
                outcome(contestant.make(), copied(call), shape.least)
    torch.compiler.reset()
    torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--compared", default="", help="as the benchmark has it")
    parser.add_argument("--shapes", type=int, default=0, help="as the benchmark has it")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    wanted = tuple(name for name in given.compared.split(",") if name)
    request = BenchmarkRequest(tuple(given.ops), "cuda", None, 0.0, wanted, given.shapes)
    try:
        benches = chosen(request)
        require_something(request, available("cuda"))
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    if given.part is None:
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": "2", **os.environ}
        command = [sys.executable, "-m", "colossal_kernels.bench.warm", *sys.argv[1:]]
        parts = [[*command, "--part", f"{index}/{given.processes}"] for index in range(given.processes)]
        workers = [subprocess.Popen(part, env=environment, stderr=subprocess.DEVNULL) for part in parts]
        for worker in workers:
            worker.wait()
        return 0
    part, parts_in_all = (int(number) for number in given.part.split("/"))
    device = torch.device("cuda", torch.cuda.current_device())
    pairs = [(bench, shape) for bench in benches.values() for shape in bench.shapes[: given.shapes or None]]
    for bench, shape in pairs[part::parts_in_all]:
        call_once(bench, shape, wanted, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
