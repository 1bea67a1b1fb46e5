"""Random numbers that a small model draws for itself while it trains (a router does): the same for the same call on every rank.

Ranks on which a tensor is whole draw what one process draws; one that has a part of it draws other numbers, and the plan is not exact.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_LOCK = threading.Lock()
"""Simulated ranks are threads, and there is one random state for all of them."""


class SameDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, the n-th operation of this thread that draws starts from the random state of seed n. The state outside is left alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_draws = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **(kwargs or {}))
        self._num_draws += 1
        with _LOCK, torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._num_draws)
            return func(*args, **(kwargs or {}))
