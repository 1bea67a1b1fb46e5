"""Every dropout of a model drawing keyed numbers, so that training with dropout is the same on any mesh.

Modules (`nn.Dropout`) and calls of `nn.functional.dropout` in the methods of any module (`functional_dropout.py`) are keyed alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from colossal_core.functional_dropout import KeyedMethods, keyed_methods
from colossal_core.random import RandomKey, keyed_dropout

_OTHER_KINDS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class MicrobatchKey:
    """What the dropouts of one microbatch are keyed by.

    key: seed and step. sample_ids: [B] int64, the samples' indices in the global batch of the step, on the model's device. positions: [L]
    int64, the global positions of this rank's part of each sequence where an axis cuts it, else None.
    """

    key: RandomKey
    sample_ids: torch.Tensor
    positions: torch.Tensor | None = None


class KeyedDropoutState:
    """The key that one model's dropouts read in their forward pass. Set before each microbatch; kept and put back by recomputation.

    A plain object, not a context variable: autograd's device threads and compiled code see it too. names: the modules that draw keyed
    numbers; unkeyed: those that draw from torch's generator (`seed_fused`), because of their kind, because of how they call dropout (the
    reason follows the name) or because an input had no sample dimension.
    """

    def __init__(self) -> None:
        self.unkeyed: list[str] = []
        self._layers: list[KeyedLayer] = []
        self._current: MicrobatchKey | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self._layers)

    def add(self, name: str, number: int) -> KeyedLayer:
        """One more dropout that reads this state."""
        self._layers.append(KeyedLayer(self, name, torch.tensor(number, device="cpu")))
        return self._layers[-1]

    def set(self, seed: int, step: int, sample_ids: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """Before the forward pass of a microbatch. Does not wait for the device."""
        self._current = MicrobatchKey(RandomKey.of(seed, step, sample_ids.device), sample_ids, positions)
        for layer in self._layers:
            if layer.number.device != sample_ids.device:  # only the first time: the model was on its way to the device
                layer.number = layer.number.to(sample_ids.device)

    def clear(self) -> None:
        """After a step: dropouts called outside of one draw from torch's generator again."""
        self._current = None

    def capture(self) -> MicrobatchKey | None:
        return self._current

    def restore(self, saved: MicrobatchKey | None) -> None:
        self._current = saved

    @contextmanager
    def replay(self, saved: MicrobatchKey | None) -> Iterator[None]:
        """The state as it was at `capture`, for a recomputation; then as it was before."""
        before = self._current
        self._current = saved
        try:
            yield
        finally:
            self._current = before


class KeyedLayer:
    """What one module's dropouts read. number: 0-d int64, its place in `named_modules()`; as a tensor, because compiled blocks that
    differ in a plain number are compiled one by one.
    """

    def __init__(self, state: KeyedDropoutState, name: str, number: torch.Tensor) -> None:
        self.state = state
        self.name = name
        self.number = number

    def __deepcopy__(self, memo: dict[int, object]) -> KeyedLayer:
        """A copy of the model reads the same state."""
        return self

    def dropout(
        self, call: int, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        """`torch.nn.functional.dropout` with keyed numbers. call: which of the module's calls this is, in [0, 2^31); each draws its own.

        The layer key is number + 2^32 * call, so that a module with one call (0) has its number for a key.
        """
        current = self.state.capture()
        if not training or p == 0.0 or current is None:
            return F.dropout(input, p, training, inplace)
        if input.dim() == 0 or input.shape[0] % current.sample_ids.shape[0]:
            if self.name not in self.state.unkeyed:
                self.state.unkeyed.append(self.name)
            return F.dropout(input, p, training, inplace)
        layer = self.number + (call << 32) if call else self.number
        kept = keyed_dropout(input, p, current.key, current.sample_ids, layer, positions=_positions(input, current))
        return input.copy_(kept) if inplace else kept


def install_keyed_dropout(model: nn.Module) -> KeyedDropoutState:
    """Gives every `nn.Dropout`, and every module whose methods call `nn.functional.dropout`, methods that draw keyed numbers, as
    attributes of the instance; no module or parameter changes its name.

    `model` is the whole, uncut model: a module's number is its place in `named_modules()`, and so the same on every mesh. x is
    [B, ...], or [B * k, ...] with the k rows of a sample together; a first dimension that is no multiple of the number of samples (tokens
    sorted by expert, tables shared by samples) falls back to torch's generator, and the module's name is added to `unkeyed`. In
    eval mode, with p = 0 and before the first `set` a dropout does what it always did.
    """
    state = KeyedDropoutState()
    methods: dict[type[nn.Module], KeyedMethods] = {}
    for number, (name, module) in enumerate(model.named_modules()):
        kind = type(module)
        if kind.forward is nn.Dropout.forward and "forward" not in vars(module):
            module.keyed_layer = state.add(name, number)
            module.forward = MethodType(forward, module)
            continue
        if _draws_inside(module):
            state.unkeyed.append(name)
        if kind not in methods:
            methods[kind] = keyed_methods(kind)
        found = methods[kind]
        state.unkeyed.extend(f"{name}: {reason}" for reason in found.left)
        taken = [method for method in found.copies if method in vars(module)]
        state.unkeyed.extend(f"{name}: {method} is replaced on this module" for method in taken)
        if len(taken) < len(found.copies):
            module.keyed_layer = state.add(name, number)
            vars(module).update(
                {key: MethodType(copy, module) for key, copy in found.copies.items() if key not in taken}
            )
    return state


def _draws_inside(module: nn.Module) -> bool:
    """Whether it is one of torch's own modules that draw by a rule of their own."""
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0.0
    return isinstance(module, _OTHER_KINDS)


def forward(self: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    """A dropout module's new forward. A pickle finds a method by its name, so it has the name of the old one."""
    return cast(KeyedLayer, self.keyed_layer).dropout(0, x, self.p, self.training, self.inplace)


def _positions(x: torch.Tensor, current: MicrobatchKey) -> torch.Tensor | None:
    """The global positions, where x has one row for each of them; another shape (one row a sample) is not cut along the sequence."""
    if current.positions is None:
        return None
    num_rows = x.shape[0] // current.sample_ids.shape[0]
    for size in x.shape[1:-1]:
        num_rows *= size
    return current.positions if num_rows == current.positions.shape[0] else None
