"""Counting the bytes of tensors that are alive, below autograd, as a device's allocator would."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colossal_core._torch_private import TorchDispatchMode, storage_key
from colossal_core.dataflow import tensors_in

ALLOCATION_BYTES = 512
"""CUDA's caching allocator gives whole multiples of this many bytes."""


def allocated(num_bytes: int) -> int:
    """What the allocator takes for a tensor of `num_bytes`."""
    return -(-num_bytes // ALLOCATION_BYTES) * ALLOCATION_BYTES


@dataclass
class Window:
    """The highest and the last number of live bytes inside a `LiveBytes.window`."""

    peak: int = 0
    end: int = 0


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, every storage that an operator makes is counted until it dies. Works on fake tensors as on real ones.

    current: bytes alive; peak: the most at once; is_paused: inside `paused`. Storages of tensors given to
    `ignore` are not counted (parameters, inputs); these tensors must outlive it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._ignored: set[int] = set()
        self.is_paused = False

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        self._ignored.update(storage_key(tensor) for tensor in tensors)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is one of those that are counted."""
        return storage_key(tensor) in self._alive

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is made inside is not counted."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    @contextmanager
    def window(self) -> Iterator[Window]:
        """Measures a part of the run; its numbers are there when it is left."""
        found, outer = Window(), self.peak
        self.peak = self.current
        try:
            yield found
        finally:
            found.peak, found.end = self.peak, self.current
            self.peak = max(outer, self.peak)

    def restart(self) -> int:
        """The peak so far; from here on it is found anew."""
        found, self.peak = self.peak, self.current
        return found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if not self.is_paused:
            for tensor in tensors_in(out):
                self._count(tensor)
        return out

    def _count(self, tensor: Any) -> None:
        key = storage_key(tensor)
        if key in self._alive or key in self._ignored:
            return
        storage = tensor.untyped_storage()
        size = allocated(storage.nbytes())
        self._alive[key] = weakref.ref(storage, functools.partial(self._died, key, size))
        self.current += size
        self.peak = max(self.peak, self.current)

    def _died(self, key: int, size: int, reference: object) -> None:
        del reference
        del self._alive[key]
        self.current -= size
