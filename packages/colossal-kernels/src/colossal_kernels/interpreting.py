"""Whether Triton interprets kernels on the CPU in this process (`TRITON_INTERPRET=1`, set before Triton is imported)."""

from __future__ import annotations

import os


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "") == "1"
