"""Every name of torch that is not public, and the versions on which each was tried. Nothing else in this package imports one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any


def backward_that_can_run_again() -> AbstractContextManager[object]:
    """Inside, what torch.compile compiles keeps what its backward pass reads, so that a graph can be gone through again and again.

    Tried on torch 2.11.0 and 2.13.0 (CPU).
    """
    from torch._functorch import config

    settings: Any = config
    patched: AbstractContextManager[object] = settings.patch(donated_buffer=False)
    return patched
