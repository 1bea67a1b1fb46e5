"""Moments of an elementwise optimizer, however they are kept: as wide as the masters, or narrower, or beside masters in bf16.

The optimizer writes its update once, over lists of tensors of one dtype (float32, or float64 under fp64); what is kept narrower is widened,
updated and narrowed again in chunks, so that the wide copies are small.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch

from colossal_core.errors import ConfigError, Problem
from colossal_core.optimizer_state import StateTensor
from colossal_core.optimizers import Groups, OptimizerContext
from colossal_core.rounding import BLOCK, FIRST_MOMENT, SECOND_MOMENT, Code, keyed_generator, round_to_bf16
from colossal_core.tensor_lists import Tensors, assign_unless

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.config import OptimizerConfig

PORTION_ELEMENTS = 1 << 25
"""Elements that are updated before what they are needed for is started: 0.3 ms of an H200's memory."""

CHUNK_ELEMENTS = 1 << 24
"""Elements that are widened at a time: with two moments, 0.4 GB of float32."""

Update = Callable[[Tensors, Tensors, Sequence[Tensors], "torch.Tensor | None", "torch.Tensor | None"], None]
"""(masters, raw gradients, one list a moment, clip, skip): in place on masters and moments."""


@dataclass(frozen=True)
class Moment:
    """One moment of an optimizer. name: as in `adamw.exp_avg`. positive: it is an average of squares."""

    name: str
    positive: bool = False


class _Store(Protocol):
    def step(self, update: Update, clip: torch.Tensor | None, skip: torch.Tensor | None, number: int) -> None: ...

    def tensors(self) -> Iterable[StateTensor]: ...


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
            stores: list[_Store] = [_WideStore(kind, moments, wide, context)] if wide else []
            for together in _sets_that_lie_alike(narrow, context):
                stores.append(_NarrowStore(kind, moments, together, config.states, context))
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


class _WideStore:
    """Moments as tensors of the masters' shape and dtype."""

    def __init__(
        self, kind: str, moments: Sequence[Moment], masters: Sequence[nn.Parameter], context: OptimizerContext
    ) -> None:
        self._kind = kind
        self._moments = moments
        self._masters = list(masters)
        self._context = context
        self._values = [[torch.zeros_like(master, requires_grad=False) for master in masters] for _ in moments]
        self._portions = _portions([master.numel() for master in masters])

    def step(self, update: Update, clip: torch.Tensor | None, skip: torch.Tensor | None, number: int) -> None:
        del number
        for portion in self._portions:
            gradients = [self._context.gradient(self._masters[index]) for index in portion]
            present = [index for index, gradient in zip(portion, gradients, strict=True) if gradient is not None]
            update(
                [self._masters[index].detach() for index in present],
                [gradient for gradient in gradients if gradient is not None],
                [[values[index] for index in present] for values in self._values],
                clip,
                skip,
            )
            self._context.updated([self._masters[index] for index in portion])

    def tensors(self) -> Iterable[StateTensor]:
        for index, master in enumerate(self._masters):
            for moment, values in zip(self._moments, self._values, strict=True):
                yield StateTensor(f"{self._kind}.{moment.name}", master, values[index])


@dataclass(frozen=True)
class _Part:
    """Elements [start, stop) of a master's flat storage, at `offset` in a chunk."""

    master: int
    start: int
    stop: int
    offset: int


class _NarrowStore:
    """Moments of several masters behind one another in one flat storage each, every master from the start of a block."""

    def __init__(
        self,
        kind: str,
        moments: Sequence[Moment],
        masters: Sequence[nn.Parameter],
        states: str,
        context: OptimizerContext,
    ) -> None:
        self._kind = kind
        self._moments = moments
        self._masters = list(masters)
        self._context = context
        self._starts, length = [], 0
        for master in self._masters:
            self._starts.append(length)
            length += -(-master.numel() // BLOCK) * BLOCK
        self._length = length
        self._values: list[_NarrowValues] = [_narrow_values(moment, states, length, context) for moment in moments]
        self._key = self._names_and_place()

    def _names_and_place(self) -> str:
        layouts = [self._context.shard(master).layout for master in self._masters]
        mesh = self._context.collectives.mesh
        place = mesh.flat_index(self._context.coordinate, layouts[0].state.cut_axes)
        return f"{place} {' '.join(layout.full_name for layout in layouts)}"

    def step(self, update: Update, clip: torch.Tensor | None, skip: torch.Tensor | None, number: int) -> None:
        for low, high, parts in self._chunks():
            generator = keyed_generator(self._context.device, self._context.seed, number, low, self._key)
            masters = [self._masters[part.master].detach().view(-1)[part.start : part.stop] for part in parts]
            gradients = [self._gradient(part) for part in parts]
            wide_masters = self._widened(masters, parts, high - low)
            wide_gradients = self._widened(gradients, parts, high - low)
            moments = [values.read(low, high) for values in self._values]
            update([wide_masters], [wide_gradients], [[moment] for moment in moments], clip, skip)
            for values, moment in zip(self._values, moments, strict=True):
                values.write(low, high, moment, skip, generator)
            if masters[0].dtype == torch.bfloat16:
                wide_masters = round_to_bf16(wide_masters, generator)
            torch._foreach_copy_(masters, _views(wide_masters, parts))

    def _gradient(self, part: _Part) -> torch.Tensor:
        gradient = self._context.gradient(self._masters[part.master])
        assert gradient is not None, "a step before the first backward pass"
        return gradient.reshape(-1)[part.start : part.stop]

    def _widened(self, tensors: Sequence[torch.Tensor], parts: Sequence[_Part], length: int) -> torch.Tensor:
        wide = torch.zeros(length, dtype=torch.float32, device=self._context.device)
        torch._foreach_copy_(_views(wide, parts), list(tensors))
        return wide

    def _chunks(self) -> Iterator[tuple[int, int, list[_Part]]]:
        """[low, high) of the flat storage, and what of the masters lies in it."""
        step = max(CHUNK_ELEMENTS // BLOCK, 1) * BLOCK
        for low in range(0, self._length, step):
            high = min(low + step, self._length)
            parts = []
            for index, (start, master) in enumerate(zip(self._starts, self._masters, strict=True)):
                first, last = max(low, start), min(high, start + master.numel())
                if first < last:
                    parts.append(_Part(index, first - start, last - start, first - low))
            yield low, high, parts

    def tensors(self) -> Iterable[StateTensor]:
        for start, master in zip(self._starts, self._masters, strict=True):
            for moment, values in zip(self._moments, self._values, strict=True):
                yield values.state_tensor(f"{self._kind}.{moment.name}", master, start)


def _views(flat: torch.Tensor, parts: Sequence[_Part]) -> Tensors:
    return [flat[part.offset : part.offset + part.stop - part.start] for part in parts]


class _NarrowValues(Protocol):
    """Flat values of which ranges are read as float32 and written."""

    def read(self, low: int, high: int) -> torch.Tensor: ...

    def write(
        self, low: int, high: int, values: torch.Tensor, skip: torch.Tensor | None, generator: torch.Generator
    ) -> None: ...

    def state_tensor(self, kind: str, master: nn.Parameter, start: int) -> StateTensor: ...


def _narrow_values(moment: Moment, states: str, length: int, context: OptimizerContext) -> _NarrowValues:
    if states == "int8":
        return _CodedValues(SECOND_MOMENT if moment.positive else FIRST_MOMENT, length, context)
    return _FloatValues(torch.bfloat16 if states == "bf16" else torch.float32, length, context)


class _FloatValues:
    """As float32 (read in place) or bf16."""

    def __init__(self, dtype: torch.dtype, length: int, context: OptimizerContext) -> None:
        self._values = torch.zeros(length, dtype=dtype, device=context.device)

    def read(self, low: int, high: int) -> torch.Tensor:
        return self._values[low:high].to(torch.float32)

    def write(
        self, low: int, high: int, values: torch.Tensor, skip: torch.Tensor | None, generator: torch.Generator
    ) -> None:
        """In a skipped step the values are what was read, which neither format changes."""
        del skip
        if self._values.dtype == torch.bfloat16:
            self._values[low:high].copy_(round_to_bf16(values, generator))

    def state_tensor(self, kind: str, master: nn.Parameter, start: int) -> StateTensor:
        return StateTensor(kind, master, self._values[start : start + master.numel()].view(master.shape))


class _CodedValues:
    """As 8-bit codes and a scale for each block of 256."""

    def __init__(self, code: Code, length: int, context: OptimizerContext) -> None:
        self._code = code
        self._context = context
        self._codes = torch.zeros(length, dtype=code.dtype, device=context.device)
        self._scales = torch.zeros(length // BLOCK, dtype=torch.float32, device=context.device)

    def read(self, low: int, high: int) -> torch.Tensor:
        return self._code.decode(self._codes[low:high], self._scales[low // BLOCK : high // BLOCK])

    def write(
        self, low: int, high: int, values: torch.Tensor, skip: torch.Tensor | None, generator: torch.Generator
    ) -> None:
        codes, scales = self._code.encode(values, generator)
        kept = [self._codes[low:high], self._scales[low // BLOCK : high // BLOCK]]
        assign_unless(skip, kept, [codes, scales])

    def state_tensor(self, kind: str, master: nn.Parameter, start: int) -> StateTensor:
        """The values as a copy on the host, so that saving needs no wide copy on the device; what is loaded is coded again."""
        stop = start + -(-master.numel() // BLOCK) * BLOCK
        copy = self.read(start, stop).cpu()[: master.numel()].view(master.shape)

        def store() -> None:
            padded = torch.zeros(stop - start, dtype=torch.float32, device=self._context.device)
            padded[: master.numel()].copy_(copy.view(-1))
            self.write(
                start, stop, padded, None, keyed_generator(self._context.device, self._context.seed, kind, start)
            )

        stored = stop - start + (stop - start) // BLOCK * 4
        return StateTensor(kind, master, copy, store=store, stored_bytes=stored)
