"""Moments of an elementwise optimizer, however they are kept: as wide as the masters, or narrower, or beside masters in bf16.

The optimizer hands lists of tensors as they are kept to an op, which widens what is narrow, updates it and rounds it once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from colossal_core.errors import ConfigError, Problem
from colossal_core.optimizer_state import StateTensor
from colossal_core.optimizers import Groups, OptimizerContext
from colossal_core.rounding import (
    BLOCK,
    FIRST_MOMENT,
    SECOND_MOMENT,
    Code,
    Coded,
    Kept,
    keyed_generator,
    keyed_seed,
)
from colossal_core.tensor_lists import Tensors

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.config import OptimizerConfig

PORTION_ELEMENTS = 1 << 25
"""Elements that are updated before what they are needed for is started: 0.3 ms of an H200's memory."""


@dataclass(frozen=True)
class Portion:
    """Masters that are updated together: what an op takes of them.

    gradients: raw. moments: one list for each. copies: where the new values go too, in the compute dtype; None: nowhere. seed: of what is
    rounded stochastically; None where nothing is kept narrow.
    """

    masters: Tensors
    gradients: Tensors
    moments: Sequence[Sequence[Kept]]
    copies: Tensors | None
    seed: int | None


Update = Callable[[Portion, "torch.Tensor | None", "torch.Tensor | None"], None]
"""(portion, clip, skip): in place on masters and moments."""


@dataclass(frozen=True)
class Moment:
    """One moment of an optimizer. name: as in `adamw.exp_avg`. positive: it is an average of squares."""

    name: str
    positive: bool = False


class Moments:
    """The moments of all masters in `groups`. They start at zero.

    kind: the optimizer's name, with which their kinds start. What is rounded stochastically is keyed by (seed, number of the step in the
    life of the training, the parameters that lie together, this rank's place along the axes that cut them): copies round alike, and a
    run is repeated exactly on the same mesh, also after a checkpoint; another mesh draws otherwise.
    """

    def __init__(
        self, kind: str, moments: Sequence[Moment], groups: Groups, config: OptimizerConfig, context: OptimizerContext
    ) -> None:
        self._kind = kind
        self._num_steps = 0
        self._stores: list[list[_Store]] = []
        # Of the whole run: what a checkpoint holds must not depend on whether this rank has anything to train.
        self._draws = context.master_dtype is not None and _is_narrow(context.master_dtype, config)
        for group in groups:
            masters: list[nn.Parameter] = group["params"]
            narrow = [master for master in masters if _is_narrow(master.dtype, config)]
            wide = [master for master in masters if not _is_narrow(master.dtype, config)]
            stores = [_Store(kind, moments, wide, None, context)] if wide else []
            for together in _sets_that_lie_alike(narrow, context):
                stores.append(_Store(kind, moments, together, config.states, context))
                self._draws = True
            self._stores.append(stores)

    def begin_step(self) -> None:
        """Once before the updates of a step."""
        self._num_steps += 1

    def step(self, index: int, update: Update, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        """Runs `update` on the masters of the group with this index."""
        for store in self._stores[index]:
            store.step(update, clip, skip, self._num_steps)

    def tensors(self) -> Iterable[StateTensor]:
        """The moments in the order of the groups, and the number of steps that drew random numbers where there are any (skipped steps
        included: the host counts them without asking the device)."""
        if self._draws:
            counted = torch.tensor(self._num_steps)

            def take_back() -> None:
                self._num_steps = int(counted)

            yield StateTensor(f"{self._kind}.draws", None, counted, store=take_back)
        for stores in self._stores:
            for store in stores:
                yield from store.tensors()


def _is_narrow(dtype: torch.dtype, config: OptimizerConfig) -> bool:
    """dtype: of masters."""
    return dtype != torch.float64 and (config.states != "fp32" or dtype != torch.float32)


def _sets_that_lie_alike(masters: Sequence[nn.Parameter], context: OptimizerContext) -> Iterable[list[nn.Parameter]]:
    """Masters whose copies are on the same ranks, so that each set is the same wherever a copy of it is."""
    found: defaultdict[object, list[nn.Parameter]] = defaultdict(list)
    for master in masters:
        if not master.is_contiguous():
            reason = f"{context.shard(master).layout.full_name} is not contiguous in memory"
            raise ConfigError([Problem("optimizer.states", reason, "make it so, or use states: fp32, masters: fp32")])
        state = context.shard(master).layout.state
        found[state.cut_axes, state.replicated, state.present].append(master)
    return found.values()


def _portions(numels: Sequence[int]) -> list[range]:
    """The masters in turn, as many together as `PORTION_ELEMENTS` hold: while one portion is updated, the last one is on its way."""
    ends, elements = [], 0
    for index, numel in enumerate(numels):
        if elements and elements + numel > PORTION_ELEMENTS:
            ends.append(index)
            elements = 0
        elements += numel
    bounds = [0, *ends, len(numels)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


class _Store:
    """Moments of several masters. states: how they are kept, which may be rounded; None: as tensors of the masters' shape and dtype."""

    def __init__(
        self,
        kind: str,
        moments: Sequence[Moment],
        masters: Sequence[nn.Parameter],
        states: str | None,
        context: OptimizerContext,
    ) -> None:
        self._kind = kind
        self._moments = moments
        self._masters = list(masters)
        self._states = states
        self._context = context
        self._values = [_allocated(moment, masters, states, context.device) for moment in moments]
        self._portions = _portions([master.numel() for master in masters])
        self._key = "" if states is None else self._names_and_place()

    def _names_and_place(self) -> str:
        layouts = [self._context.shard(master).layout for master in self._masters]
        mesh = self._context.collectives.mesh
        place = mesh.flat_index(self._context.coordinate, layouts[0].state.cut_axes)
        return f"{place} {' '.join(layout.full_name for layout in layouts)}"

    def step(self, update: Update, clip: torch.Tensor | None, skip: torch.Tensor | None, number: int) -> None:
        for portion in self._portions:
            gradients = [self._context.gradient(self._masters[index]) for index in portion]
            present = [index for index, gradient in zip(portion, gradients, strict=True) if gradient is not None]
            masters = [self._masters[index] for index in present]
            seed = None
            if self._states is not None:
                assert len(present) == len(portion), "a step before the first backward pass"
                seed = keyed_seed(self._context.seed, number, portion.start, self._key)
            given = Portion(
                [master.detach() for master in masters],
                [gradient for gradient in gradients if gradient is not None],
                [[values[index] for index in present] for values in self._values],
                self._context.copies(masters),
                seed,
            )
            update(given, clip, skip)
            self._context.updated([self._masters[index] for index in portion])

    def tensors(self) -> Iterable[StateTensor]:
        for index, master in enumerate(self._masters):
            for moment, values in zip(self._moments, self._values, strict=True):
                yield self._state_tensor(f"{self._kind}.{moment.name}", master, values[index], index)

    def _state_tensor(self, kind: str, master: nn.Parameter, kept: Kept, index: int) -> StateTensor:
        """Coded values as a copy on the host, so that saving needs no wide copy on the device; what is loaded is coded again."""
        if isinstance(kept, torch.Tensor):
            return StateTensor(kind, master, kept)
        coded, context = kept, self._context
        copy = coded.code.decode(coded.codes, coded.scales).cpu()[: coded.numel].view(master.shape)

        def store() -> None:
            padded = torch.zeros(len(coded.codes), dtype=torch.float32, device=context.device)
            padded[: coded.numel].copy_(copy.view(-1))
            codes, scales = coded.code.encode(padded, keyed_generator(context.device, context.seed, kind, index))
            coded.codes.copy_(codes)
            coded.scales.copy_(scales)

        return StateTensor(kind, master, copy, store=store, stored_bytes=coded.codes.nbytes + coded.scales.nbytes)


def _allocated(
    moment: Moment, masters: Sequence[nn.Parameter], states: str | None, device: torch.device
) -> Sequence[Kept]:
    """Zeros. What is narrower lies in one flat storage, every master's from the start of a block."""
    if states is None:
        return [torch.zeros_like(master, requires_grad=False) for master in masters]
    starts, length = [], 0
    for master in masters:
        starts.append(length)
        length += -(-master.numel() // BLOCK) * BLOCK
    if states == "int8":
        return _coded_zeros(SECOND_MOMENT if moment.positive else FIRST_MOMENT, masters, starts, length, device)
    flat = torch.zeros(length, dtype=torch.bfloat16 if states == "bf16" else torch.float32, device=device)
    return [
        flat[start : start + master.numel()].view(master.shape) for start, master in zip(starts, masters, strict=True)
    ]


def _coded_zeros(
    code: Code, masters: Sequence[nn.Parameter], starts: Sequence[int], length: int, device: torch.device
) -> list[Coded]:
    codes = torch.zeros(length, dtype=code.dtype, device=device)
    scales = torch.zeros(length // BLOCK, dtype=torch.float32, device=device)
    found = []
    for start, stop, master in zip(starts, [*starts[1:], length], masters, strict=True):
        own = slice(start // BLOCK, stop // BLOCK)
        found.append(Coded(codes[start:stop], scales[own], code, master.numel()))
    return found
