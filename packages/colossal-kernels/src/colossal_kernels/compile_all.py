"""`python -m colossal_kernels.compile_all [WORDS]` compiles every kernel for sm_90, without a GPU, and prints what each uses as JSON.

WORDS: only builds whose name has one of them.
"""

from __future__ import annotations

import importlib
import json
import sys

from colossal_kernels.builds import Build, compile_build
from colossal_kernels.table import TRITON


def all_builds() -> tuple[Build, ...]:
    """Those of every module that the table names."""
    modules = [importlib.import_module(f"{__package__}.{name}") for name in dict.fromkeys(e.module for e in TRITON)]
    return tuple(build for module in modules for build in module.builds())


def main(words: list[str]) -> None:
    chosen = [build for build in all_builds() if not words or any(word in build.name for word in words)]
    reports = [compile_build(build) for build in chosen]
    keys = ("name", "registers", "spilled_bytes", "shared_bytes")
    sys.stdout.write(json.dumps([{key: getattr(report, key) for key in keys} for report in reports], indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
