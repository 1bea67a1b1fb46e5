"""What is handed on between the blocks of a model, and where each parameter is read: one more forward pass on meta, watched op by op.

A forward pass is a time line of `n` block calls: position `2k` is everything that runs between block calls k-1 and k, `2k + 1` is block
call k, and `2n` is what runs after the last one. A *unit* is a block, or an outermost module outside every block that holds parameters and
no block (the embedding, the last norm, the head). What runs outside every unit (masks, rotary tables, sums of embeddings) can be computed
again wherever it is needed; what a unit makes has to be handed over. So every tensor is followed back to the outputs of units that it is
made of, and every later op that reads it is noted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from colossal_core._torch_private import OpOverload, TorchDispatchMode, arguments_written, packet_of, storage_key
from colossal_core.anatomy import BlockChain
from colossal_core.dataflow import Trace, first_line, meta_pass, tensors_in, with_tensors


@dataclass(frozen=True)
class Passed:
    """A tensor that a call of a unit makes, and that is read later. call: which call of that unit in one forward pass, from 0. output:
    which tensor of the call's output, in the order of `dataflow.tensors_in`. made: position of the call. used: the last position at
    which something outside the call reads it, or what is computed from it between units; `2n` also where the model returns it.
    """

    unit: str
    call: int
    output: int
    made: int
    used: int


@dataclass(frozen=True)
class Flow:
    """blocks: names in order of calls, a repeated block several times. outside: units outside blocks in the order of their first calls,
    with the positions of their calls; those that are never called are left out. read: for every parameter, by its full name, the
    positions at which it is read, sorted; () for one that never is. passed: tensors that are read at a later position than they are made
    at, by (made, output).

    Before block call `a`, what is handed on is every `passed` with `made < 2 * a <= used`.
    """

    blocks: tuple[str, ...]
    outside: tuple[tuple[str, tuple[int, ...]], ...]
    read: tuple[tuple[str, tuple[int, ...]], ...]
    passed: tuple[Passed, ...]

    def crossing(self, block_call: int) -> tuple[Passed, ...]:
        """What is handed on before a block call."""
        return tuple(each for each in self.passed if each.made < 2 * block_call <= each.used)


def follow(
    model: nn.Module, batch: Mapping[str, object] | None, chains: Iterable[BlockChain], found: Trace
) -> tuple[Flow | None, str]:
    """The flow between the blocks that were found by data flow, or None and the reason. found: the trace that showed the chains."""
    blocks = [name for chain in chains if chain.found_by == "data flow" for name in chain.names]
    if found.error or batch is None:
        return None, found.error
    if not blocks:
        return None, "no block was found by data flow"
    watched: list[_Follower] = []

    def watch(shadow: nn.Module) -> _Follower:
        watched.append(_Follower(shadow, blocks))
        return watched[0]

    try:
        output = meta_pass(model, batch, watch, branch=found.branch, fused_dropout=set())
        return watched[0].flow(output), ""
    except _LeakError as leak:
        return None, str(leak)
    except Exception as error:  # an operator that cannot be watched: the model is known without its flow
        return None, first_line(error)


def units_outside(model: nn.Module, blocks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """The outermost modules that hold a parameter and no block, and lie in none; in the order of `named_modules()`, called or not."""
    chained = {id(block) for block in blocks}
    seen = {id(module) for block in blocks for module in block.modules()}
    found: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if any(id(part) in chained for part in module.modules()):
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}" if name else child_name, child)
        elif next(module.parameters(), None) is not None:
            found[name] = module

    visit("", model)
    return found


FACTORIES = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        *("empty_like", "full_like", "ones_like", "zeros_like", "rand_like", "randn_like", "randint_like"),
        *("new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros"),
    )
)
"""Operators that ask a tensor for its shape and type alone."""


class _LeakError(Exception):
    """A tensor made inside a unit's call is read elsewhere and is no output of the call: cut there, the model would miss it."""


@dataclass(eq=False)
class _Made:
    """A source: one tensor of a unit's output."""

    unit: str
    call: int
    output: int
    made: int
    used: int


@dataclass(eq=False)
class _Read:
    """A source: a parameter."""

    name: str
    positions: set[int] = field(default_factory=set)


@dataclass(eq=False)
class _Call:
    """A running call of a unit, and the source of what is made inside it."""

    unit: str
    number: int
    position: int


_Sources: TypeAlias = frozenset[_Made | _Read | _Call]
_NONE: _Sources = frozenset()


class _Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows sources by storage: a view has those of its base, and a write through a view reaches it. Outputs of units get storages of
    their own, so that a tensor which a unit merely passes on is told from the one that it was given.
    """

    def __init__(self, shadow: nn.Module, blocks: Iterable[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources: dict[int, tuple[Tensor, _Sources]] = {}  # the tensor keeps the storage, and so its key, alive
        self._parameters = {id(parameter): _Read(name) for name, parameter in shadow.named_parameters()}
        for parameter in shadow.parameters():
            self._set(parameter, self._of(parameter) | {self._parameters[id(parameter)]})
        self._position = 0
        self._running: _Call | None = None
        self._depth = 0
        self._blocks: list[str] = []
        self._outside: dict[str, list[int]] = {}
        self._num_calls: dict[str, int] = {}
        self._made: list[_Made] = []
        chained = {name: shadow.get_submodule(name) for name in blocks}
        self._watch(chained, blocks=True)
        self._watch(units_outside(shadow, chained.values()), blocks=False)

    def _watch(self, units: Mapping[str, nn.Module], *, blocks: bool) -> None:
        for name, unit in units.items():
            owned = tuple(self._parameters[id(parameter)] for parameter in unit.parameters())

            def enter(module: nn.Module, args: object, name: str = name, owned: tuple[_Read, ...] = owned) -> None:
                self._enter(name, owned, block=blocks)

            unit.register_forward_pre_hook(enter)
            unit.register_forward_hook(lambda module, args, output: self._leave(output, block=blocks))

    def _enter(self, name: str, owned: Iterable[_Read], *, block: bool) -> None:
        self._depth += 1
        if self._depth == 1:
            number = self._num_calls.get(name, 0)
            self._num_calls[name] = number + 1
            if block:
                self._blocks.append(name)
                self._position += 1
            else:
                self._outside.setdefault(name, []).append(self._position)
            self._running = _Call(name, number, self._position)
        for parameter in owned:  # all of them: which expert is asked does not show
            parameter.positions.add(self._position)

    def _leave(self, output: object, *, block: bool) -> object:
        self._depth -= 1
        call = self._running
        if self._depth or call is None:
            return output
        given = list(tensors_in(output))
        self._note_reads(given)  # what is passed on unread is read too
        self._running = None
        handed = [torch.empty_strided(it.shape, it.stride(), dtype=it.dtype, device=it.device) for it in given]
        for index, tensor in enumerate(handed):
            made = _Made(call.unit, call.number, index, call.position, call.position)
            self._made.append(made)
            self._set(tensor, frozenset({made}))
        if block:
            self._position += 1
        return with_tensors(output, iter(handed))

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if packet_of(func) in FACTORIES:
            sources = _NONE
        else:
            sources = self._note_reads(tensors_in((args, kwargs)))
        if self._running is not None and sources:
            sources = frozenset({self._running})
        for tensor in tensors_in(result):
            if storage_key(tensor) not in self._sources:
                self._set(tensor, sources)
        for tensor in tensors_in(arguments_written(func, args, kwargs)):
            self._set(tensor, self._of(tensor) | sources)
        return result

    def _note_reads(self, tensors: Iterable[Tensor]) -> _Sources:
        """Their sources; each is read at the position that is running."""
        sources = _NONE.union(*(self._of(tensor) for tensor in tensors))
        for source in sources:
            if isinstance(source, _Made):
                source.used = max(source.used, self._position)
            elif isinstance(source, _Read):
                source.positions.add(self._position)
            elif source is not self._running:
                reader = "outside the blocks" if self._running is None else f"in {self._running.unit}"
                raise _LeakError(f"a tensor that {source.unit} makes and does not return is read {reader}")
        return sources

    def _of(self, tensor: Tensor) -> _Sources:
        found = self._sources.get(storage_key(tensor))
        return found[1] if found is not None else _NONE

    def _set(self, tensor: Tensor, sources: _Sources) -> None:
        self._sources[storage_key(tensor)] = (tensor, sources)

    def flow(self, output: object) -> Flow:
        """What was seen, once the model has returned `output`."""
        self._note_reads(tensors_in(output))
        passed = sorted(
            (made for made in self._made if made.used > made.made), key=lambda made: (made.made, made.output)
        )
        return Flow(
            blocks=tuple(self._blocks),
            outside=tuple((name, tuple(positions)) for name, positions in self._outside.items()),
            read=tuple((read.name, tuple(sorted(read.positions))) for read in self._parameters.values()),
            passed=tuple(Passed(made.unit, made.call, made.output, made.made, made.used) for made in passed),
        )
