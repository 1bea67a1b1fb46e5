"""Cases that share one group of ranks: functions for `WorkerPool.run` that go through them one after another.

Joining takes ranks on GPUs seconds, and a group of one name can use symmetric memory once in a process: so they join once for many cases.
Nothing that was compiled for one case is there for the next. Each case is named on the standard output when it begins, for what hangs.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

from colossal_core.collectives import Collectives

C = TypeVar("C")
R = TypeVar("R")


def of_each(
    collectives: Collectives, function: Callable[[Collectives, C], R], cases: Mapping[str, C]
) -> Mapping[str, R]:
    """What `function(collectives, case)` gives, by the case's name. What it raises is raised, with the name in a note."""
    found: dict[str, R] = {}
    for name, case in _announced(collectives, cases):
        try:
            found[name] = function(collectives, case)
        except Exception as error:
            error.add_note(f"in the case {name}")
            raise
    return found


def failures_of_each(
    collectives: Collectives, function: Callable[[Collectives, C], object], cases: Mapping[str, C]
) -> Mapping[str, str]:
    """The tracebacks of those cases with which `function(collectives, case)` raises, by name. For what fails on every rank at the same
    place, so that all can go on with the next case.
    """
    found: dict[str, str] = {}
    for name, case in _announced(collectives, cases):
        try:
            function(collectives, case)
        except (RuntimeError, AssertionError):
            found[name] = traceback.format_exc()
    return found


def _announced(collectives: Collectives, cases: Mapping[str, C]) -> Iterator[tuple[str, C]]:
    for name, case in cases.items():
        sys.stdout.write(f"rank {collectives.rank}: {name}\n")
        sys.stdout.flush()
        torch.compiler.reset()
        yield name, case
