"""Random numbers inside a fused kernel (attention dropout) of a module that an axis of the mesh cuts: other ones on each rank of the axis.

Such a kernel draws from torch's generator, which every rank seeds alike before each microbatch. Where ranks hold different heads, each
must draw numbers of its own, and all must draw the same again afterwards (a stochastic depth, a router's noise), though they have drawn
different amounts. So the generator is seeded twice: before the module by (microbatch, module, coordinate), after it by (microbatch,
module). No state of a generator is read, and the host does not wait for the device. The numbers are not those of another size of the
axis: they are the same over the data axes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from colossal_core.keyed_dropout import KeyedDropoutState
from colossal_core.random import fused_key


def seed_by_part(module: nn.Module, state: KeyedDropoutState, number: int, coordinate: int) -> None:
    """Hooks around a module's forward pass that seed torch's generators, in training mode within a step; else they do nothing.

    number: of the module, its own in the model. coordinate: this rank's along the axes that cut it. Recomputation replays it: the key is
    part of what `state` captures. Compiled, the first floating tensor that goes in and the one that comes out are copied, so that the
    compiler keeps the order; numbers that it draws by itself (no kernel takes them from the generator) are those of the graph.
    """
    around = _Around(state, torch.tensor(number, device="cpu"), coordinate)
    module.register_forward_pre_hook(around.before, with_kwargs=True)
    module.register_forward_hook(around.after)


def seeds(hook: object) -> bool:
    """Whether a module's hook is one of `seed_by_part`."""
    return isinstance(getattr(hook, "__self__", None), _Around)


class _Around:
    """What the hooks read."""

    def __init__(self, state: KeyedDropoutState, number: torch.Tensor, coordinate: int) -> None:
        self.state = state
        self.number = number
        self.coordinate = coordinate

    def __deepcopy__(self, memo: dict[int, object]) -> _Around:
        """A copy of the model reads the same state."""
        return self

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        current = self.state.capture()
        if not module.training or current is None or current.fused is None:
            return args, kwargs
        return _seeded((args, kwargs), current.fused, self.number, self.coordinate + 1)  # type: ignore[no-any-return]

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        del args
        current = self.state.capture()
        if not module.training or current is None or current.fused is None:
            return output
        return _seeded(output, current.fused, self.number, 0)


def _seeded(value: Any, key: torch.Tensor, number: torch.Tensor, which: int) -> Any:
    """The value after the generators were seeded."""
    if not torch.compiler.is_compiling():
        torch.manual_seed(fused_key(int(key), int(number), which))
        return value
    return _first_changed(value, key, number, which)[0]


def _first_changed(value: Any, key: torch.Tensor, number: torch.Tensor, which: int) -> tuple[Any, bool]:
    """The nest with its first floating tensor gone through the operation, and whether there was one."""
    if isinstance(value, torch.Tensor):
        return (_seed_then_copy(value, key, number, which), True) if value.is_floating_point() else (value, False)
    if isinstance(value, tuple | list):
        items, found = list(value), False
        for index, item in enumerate(items):
            if not found:
                items[index], found = _first_changed(item, key, number, which)
        return (tuple(items) if isinstance(value, tuple) else items), found
    if isinstance(value, dict):
        entries, found = dict(value), False
        for name, item in entries.items():
            if not found:
                entries[name], found = _first_changed(item, key, number, which)
        return entries, found
    return value, False


@torch.library.custom_op("colossal_core::seed_then_copy", mutates_args=())
def _seed_then_copy(x: torch.Tensor, key: torch.Tensor, number: torch.Tensor, which: int) -> torch.Tensor:
    """Seeds torch's generators by (key, number, which) and copies x. key, number: 0-d int64 on the CPU."""
    torch.manual_seed(fused_key(int(key), int(number), which))
    return x.clone()


@_seed_then_copy.register_fake
def _(x: torch.Tensor, key: torch.Tensor, number: torch.Tensor, which: int) -> torch.Tensor:
    del key, number, which
    return torch.empty_like(x)


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    del ctx
    return gradient, None, None, None


_seed_then_copy.register_autograd(_gradients)
