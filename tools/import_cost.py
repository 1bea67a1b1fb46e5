"""What `import PACKAGE` costs beside `import torch`, and what it touches: `python tools/import_cost.py --limit-ms 50 PACKAGE...`.

torch is imported once; every measurement is a fork of that process, so that the packages do not pay for one another. The median of several
decides. Environment variables, CUDA and modules that must be imported on first use only are looked at in the same process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time

import torch

RUNS = 9
ON_FIRST_USE = (
    "pydantic",
    "typer",
    "rich",
    "transformers",
    "torch.distributed.tensor",
    "matplotlib",
    "datasets",
    "pluggy",
)


def measure(package: str) -> tuple[float, list[str]]:
    """Milliseconds of the import in a forked process, and what it did that it should not have done."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        before, modules, began = dict(os.environ), set(sys.modules), time.perf_counter()
        importlib.import_module(package)
        milliseconds = 1000 * (time.perf_counter() - began)
        faults = [f"imports {name}" for name in ON_FIRST_USE if name in set(sys.modules) - modules]
        faults += ["changes an environment variable"] if dict(os.environ) != before else []
        faults += ["initialises CUDA"] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        os.write(write, json.dumps([milliseconds, faults]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0 or not text:
        sys.exit(f"import {package} failed")
    milliseconds, faults = json.loads(text)
    return float(milliseconds), list(faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit-ms", type=float, required=True)
    parser.add_argument("packages", nargs="+")
    arguments = parser.parse_args()
    failed = False
    for package in arguments.packages:
        found = [measure(package) for _ in range(RUNS)]
        median, faults = statistics.median(milliseconds for milliseconds, _ in found), found[0][1]
        if median >= arguments.limit_ms:
            faults = [*faults, f"takes longer than {arguments.limit_ms:g} ms"]
        failed = failed or bool(faults)
        print(f"import {package}: {median:.1f} ms beside torch{': ' + '; '.join(faults) if faults else ''}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
