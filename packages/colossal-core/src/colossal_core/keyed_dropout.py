"""Every `nn.Dropout` of a model drawing keyed numbers, so that training with dropout is the same on any mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

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

    A plain object, not a context variable: autograd's device threads and compiled code see it too. names: the dropouts that are keyed;
    unkeyed: those that draw from torch's generator (`seed_fused`), because of their kind or because an input had no sample dimension.
    """

    def __init__(self, unkeyed: tuple[str, ...] = ()) -> None:
        self.unkeyed = list(unkeyed)
        self._layers: list[_KeyedLayer] = []
        self._current: MicrobatchKey | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self._layers)

    def add(self, name: str, number: int) -> _KeyedLayer:
        """One more dropout that reads this state."""
        self._layers.append(_KeyedLayer(self, name, torch.tensor(number, device="cpu")))
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


class _KeyedLayer:
    """What one dropout's forward reads. number: 0-d int64, its place in `named_modules()`; as a tensor, because compiled blocks that
    differ in a plain number are compiled one by one.
    """

    def __init__(self, state: KeyedDropoutState, name: str, number: torch.Tensor) -> None:
        self.state = state
        self.name = name
        self.number = number

    def __deepcopy__(self, memo: dict[int, object]) -> _KeyedLayer:
        """A copy of the model reads the same state."""
        return self


def install_keyed_dropout(model: nn.Module) -> KeyedDropoutState:
    """Replaces the forward of every `nn.Dropout`, as an attribute of the instance; no module or parameter changes its name.

    `model` is the whole, uncut model: a dropout's layer number is its place in `named_modules()`, and so the same on every mesh. x is
    [B, ...], or [B * k, ...] with the k rows of a sample together; a first dimension that is no multiple of the number of samples (tokens
    sorted by expert, tables shared by samples) falls back to torch's generator, and the module's name is added to `unkeyed`. In
    eval mode, with p = 0 and before the first `set` the module does what it always did.
    """
    modules = list(model.named_modules())
    state = KeyedDropoutState(tuple(name for name, module in modules if isinstance(module, _OTHER_KINDS)))
    for number, (name, module) in enumerate(modules):
        if type(module) is nn.Dropout:
            module.keyed_layer = state.add(name, number)  # type: ignore[assignment]
            module.forward = MethodType(_keyed_forward, module)  # type: ignore[method-assign]
    return state


def _keyed_forward(self: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    layer = cast(_KeyedLayer, self.keyed_layer)
    current = layer.state.capture()
    if not self.training or self.p == 0.0 or current is None:
        return F.dropout(x, self.p, self.training)
    if x.dim() == 0 or x.shape[0] % current.sample_ids.shape[0]:
        if layer.name not in layer.state.unkeyed:
            layer.state.unkeyed.append(layer.name)
        return F.dropout(x, self.p, self.training)
    return keyed_dropout(x, self.p, current.key, current.sample_ids, layer.number, positions=_positions(x, current))


def _positions(x: torch.Tensor, current: MicrobatchKey) -> torch.Tensor | None:
    """The global positions, where x has one row for each of them; another shape (one row a sample) is not cut along the sequence."""
    if current.positions is None:
        return None
    num_rows = x.shape[0] // current.sample_ids.shape[0]
    for size in x.shape[1:-1]:
        num_rows *= size
    return current.positions if num_rows == current.positions.shape[0] else None
