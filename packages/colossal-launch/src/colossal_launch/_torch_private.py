"""The private names of torch that this package uses, in one place. Tried on torch 2.13; the names are there in 2.11."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def storage_key(tensor: torch.Tensor) -> int:
    """One number for the memory behind a tensor, views included; for tensors on the meta device too, which have no address."""
    return int(tensor.untyped_storage()._cdata)


def written_storages(action: Callable[[], object]) -> set[int]:
    """Keys of the storages that operations write while `action` runs."""
    writes = _Writes()
    with writes:
        action()
    return writes.storages


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the storage of every argument that an operation's schema marks as written."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(tensor, torch.Tensor):
                        self.storages.add(storage_key(tensor))
        return func(*args, **kwargs)
