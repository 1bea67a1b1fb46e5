"""Which integers of modules, and of the configs that they hold, a forward pass reads: what may have to shrink with a rank's part."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Read:
    """An integer attribute that was read. attribute: `num_heads`, or `config.num_attention_heads` for one of the module's config."""

    module: str
    attribute: str
    value: int


@contextmanager
def recorded_reads(model: nn.Module) -> Iterator[list[Read]]:
    """A list that fills while the context is open. The modules stay of their recording classes afterwards, which then record nothing."""
    found: list[Read] = []
    switch = _Switch(found)
    for name, module in model.named_modules():
        config = module.__dict__.get("config")
        if config is not None and not isinstance(config, (int, float, str, tuple, dict)):
            own = copy.copy(config)
            module.__dict__["config"] = own
            _record(own, switch, name, "config.")
        _record(module, switch, name, "")
    switch.on = True
    try:
        yield found
    finally:
        switch.on = False


class _Switch:
    def __init__(self, found: list[Read]) -> None:
        self.on, self.found = False, found


def _record(owner: Any, switch: _Switch, module: str, prefix: str) -> None:
    """Gives an object a class of its own that notes every integer read from it."""
    own: type = type(owner)
    get: Any = own.__getattribute__

    def read(self: Any, attribute: str) -> Any:
        value = get(self, attribute)
        if switch.on and type(value) is int and not attribute.startswith("_"):
            switch.found.append(Read(module, prefix + attribute, value))
        return value

    recording = type(own.__name__, (own,), {"__getattribute__": read, "__module__": own.__module__})
    try:
        owner.__class__ = recording
    except TypeError:
        return  # a class whose instances have another layout in memory: nothing of it is known
