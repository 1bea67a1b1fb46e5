"""Run as a script: imports a module and prints, as JSON, what that changed in the process beside `sys.modules`."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import warnings

import torch


def snapshot() -> dict[str, object]:
    return {
        "environment variables": dict(os.environ),
        "default dtype": str(torch.get_default_dtype()),
        "number of threads of torch": torch.get_num_threads(),
        "random state": torch.random.get_rng_state().tolist(),
        "process group": torch.distributed.is_initialized(),
        "CUDA": torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "signal handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "module search path": list(sys.path),
        "warning filters": len(warnings.filters),
        "working directory": os.getcwd(),
    }


def main(module: str) -> None:
    before = snapshot()
    importlib.import_module(module)
    after = snapshot()
    sys.stdout.write(json.dumps([what for what in before if before[what] != after[what]]))


if __name__ == "__main__":
    main(sys.argv[1])
