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
from colossal_core.random import RandomKey, fused_key, keyed_dropout

_OTHER_KINDS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class MicrobatchKey:
    """What the dropouts of one microbatch are keyed by.

    key: seed and step. sample_ids: [B] int64, the samples' indices in the global batch of the step, on the model's device. positions: [L]
    int64, the global positions of this rank's part of each sequence where an axis cuts it, else None. fused: 0-d int64 on the CPU, of seed,
    step and the first sample, for what draws inside a fused kernel.
    """

    key: RandomKey
    sample_ids: torch.Tensor
    positions: torch.Tensor | None = None
    fused: torch.Tensor | None = None


@dataclass(frozen=True)
class Part:
    """Which part of each sample a module sees, where a strategy cuts activations.

    dim: the dimension of the dropout's input that is cut (heads in [B, H, S, S]: 1; features: -1; the sequence in [B, S, F]: 1). 0 stands
    for the k rows of a sample in [B * k, ...]. start: where the part begins. total: the whole size; an input that has it there is whole.
    """

    dim: int
    start: int
    total: int

    def of(self, size: int) -> tuple[int, int]:
        """Where an input with `size` elements there begins, and the size of the whole."""
        assert self.start + size <= self.total, f"{self} of {size}"
        return self.start, self.total


@dataclass(frozen=True)
class Share:
    """`width` units from the `index`-th on, of `count` equal ones along `dim` (as in `Part`), whatever their size."""

    dim: int
    index: int
    count: int
    width: int = 1

    def of(self, size: int) -> tuple[int, int]:
        """As `Part.of`."""
        assert size % self.width == 0, f"{self} of {size}"
        unit = size // self.width
        return self.index * unit, self.count * unit


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

    def set(
        self,
        seed: int,
        step: int,
        sample_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        first_sample: int = 0,
    ) -> None:
        """Before the forward pass of a microbatch. Does not wait for the device."""
        fused = torch.tensor(fused_key(seed, step, first_sample), device="cpu")
        self._current = MicrobatchKey(RandomKey.of(seed, step, sample_ids.device), sample_ids, positions, fused)
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
    differ in a plain number are compiled one by one. part: set by a strategy on a module that sees a part of each sample; it then draws
    the numbers of that part of the whole.
    """

    def __init__(self, state: KeyedDropoutState, name: str, number: torch.Tensor) -> None:
        self.state = state
        self.name = name
        self.number = number
        self.part: Part | Share | None = None

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
        positions, features = _positions(input, current), None
        if self.part is not None:
            positions, features = _of_part(input, current, self.part, positions)
        kept = keyed_dropout(input, p, current.key, current.sample_ids, layer, positions=positions, features=features)
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


def _of_part(
    x: torch.Tensor, current: MicrobatchKey, part: Part | Share, positions: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Positions and features of x in the whole tensor, of which it is a part. positions: those that it has as it is."""
    dim, device = part.dim % x.dim(), current.sample_ids.device
    sizes = [x.shape[0] // current.sample_ids.shape[0], *x.shape[1:]]
    if isinstance(part, Part) and sizes[dim] == part.total:
        return positions, None
    first, whole_size = part.of(sizes[dim])
    if dim == x.dim() - 1 and dim > 0:
        return positions, torch.arange(sizes[dim], device=device) + first
    whole = torch.zeros(1, dtype=torch.int64, device=device)
    num_positions = 1
    for index, size in enumerate(sizes[: max(1, x.dim() - 1)]):
        total, start = (whole_size, first) if index == dim else (size, 0)
        num_positions *= total
        whole = (whole.unsqueeze(1) * total + torch.arange(size, device=device) + start).flatten()
    if current.positions is not None and num_positions == current.positions.shape[0]:
        whole = current.positions[whole]
    return whole, None
