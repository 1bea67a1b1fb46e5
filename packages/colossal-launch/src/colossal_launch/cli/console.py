"""Where the command writes: plain lines, never wrapped, so that a dotted field can be searched for and copied."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """A line for the reader, on standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """An error on standard error: `error: ` before the first line, the others under it."""
    first, *rest = text.splitlines() or [""]
    sys.stderr.write("\n".join([f"error: {first}", *(f"       {line}" for line in rest)]) + "\n")
    sys.stderr.flush()
