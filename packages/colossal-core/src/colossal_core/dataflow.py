"""Block lists by data flow: one forward pass of a structural copy on the meta device, watching which tensor goes where.

A chain is a run of list elements of which each one's first output tensor is, by identity, among the inputs of the one called next. No name
of a class or attribute is asked for, nothing is computed, and the user's model is neither moved nor called.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colossal_core.anatomy import BlockChain
from colossal_core.interfaces import ATTENTION_INTERFACE, EXPERTS_INTERFACE, calls_fused_attention, modules_reaching

MAX_ANSWERS = 10_000
"""Branches on values that a trace may take before it gives up: `while` on such an answer would not end."""


@dataclass(frozen=True)
class Call:
    """One call of a list element. inputs, output: the tensors themselves, kept alive so that identity means something."""

    block: str
    inputs: tuple[Tensor, ...]
    output: Tensor | None

    def feeds(self, following: Call) -> bool:
        return self.output is not None and any(tensor is self.output for tensor in following.inputs)


@dataclass
class Trace:
    """What one forward pass showed. calls: of the elements of each list, by the list's name, in order. error: why it stopped, else "".

    branch: the side that it took wherever the model branched on values.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    fused_dropout: set[str] = field(default_factory=set)
    error: str = ""
    branch: bool = True

    @property
    def called(self) -> set[str]:
        return {call.block for calls in self.calls.values() for call in calls}


def module_lists(model: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """Every ModuleList and Sequential that is not empty, by name, with its elements in order."""
    lists = {
        name: tuple(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    return {name: elements for name, elements in lists.items() if elements}


def trace(model: nn.Module, batch: Mapping[str, object] | None) -> Trace:
    """Runs `model(**batch)` on meta and reports. An error in the model ends the trace and is told in `error`, never raised.

    Meta tensors have no values: where the model branches on one (is this mask all ones? are these sequences packed?), the pass takes
    the true side throughout, and when that fails it is made again with the false side.
    """
    if batch is None:
        return Trace(error="no example batch is known for this class of model")
    found = _trace_once(model, batch, branch=True)
    if found.error:
        again = _trace_once(model, batch, branch=False)
        return found if again.error else again
    return found


def _trace_once(model: nn.Module, batch: Mapping[str, object], *, branch: bool) -> Trace:
    found = Trace(branch=branch)

    def watch(shadow: nn.Module) -> AbstractContextManager[object]:
        _watch(shadow, found)
        return nullcontext()

    try:
        meta_pass(model, batch, watch, branch=branch, fused_dropout=found.fused_dropout)
    except Exception as error:  # whatever a stranger's forward raises: the caller then goes by structure
        found.error = first_line(error)
    return found


def meta_pass(
    model: nn.Module,
    batch: Mapping[str, object],
    watch: Callable[[nn.Module], AbstractContextManager[object]],
    *,
    branch: bool,
    fused_dropout: set[str],
) -> object:
    """The output of `model(**batch)` on a structural copy on meta, inside the context that `watch` gives for the copy.

    branch: the answer to every question about values. fused_dropout: gets the names of modules that ask a fused kernel for dropout.
    Raises whatever the model raises.
    """
    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        shadow = meta_copy(model)
        prepare(shadow)
        meta = {key: tensor.to("meta") if isinstance(tensor, Tensor) else tensor for key, tensor in batch.items()}
        with torch.device("meta"), Observer(shadow, fused_dropout, branch=branch), watch(shadow):
            return shadow(**meta)


def first_line(error: Exception) -> str:
    """An exception of a stranger's code in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters, buffers and tensor attributes are on the meta device; ties and `requires_grad` are kept.

    Real memory is not allocated and the model is not touched: the copy's memo is filled with the meta tensors beforehand.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        attributes = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for tensor in attributes:
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                empty = torch.empty_like(tensor, device="meta", requires_grad=False)
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    shadow = copy.deepcopy(model, memo)
    for module in shadow.modules():
        module._forward_pre_hooks.clear()  # a user's hooks have effects of their own
        module._forward_hooks.clear()
    return shadow


def chains_by_data_flow(model: nn.Module, found: Trace) -> list[BlockChain]:
    """All chains seen, outermost only, in order of execution. Chains of bare layers count where there is nothing better."""
    modules = dict(model.named_modules())
    chains: list[BlockChain] = []
    for name, calls in found.calls.items():
        seen: set[str] = set()
        for run in _runs(calls):
            names = tuple(dict.fromkeys(call.block for call in run))
            if len(run) > 1 and not seen.issuperset(names):
                seen.update(names)
                chains.append(BlockChain(names, "data flow", _repeated(names, calls)))
        single = len(list(modules[name].children())) == 1 and isinstance(modules[name], nn.ModuleList)
        if single and not seen and is_checkpointing_layer(modules[calls[0].block]):
            chains.append(BlockChain((calls[0].block,), "data flow", _repeated((calls[0].block,), calls)))
    outer = outermost(chains)
    composite = [chain for chain in outer if any(list(modules[name].children()) for name in chain.names)]
    return composite or outer


def outermost(chains: list[BlockChain]) -> list[BlockChain]:
    """Those chains of which no block lies inside a block of another one; of two with a block in common, the longer, else the first."""
    kept: list[BlockChain] = []
    for chain in sorted(chains, key=lambda chain: -len(chain.names)):
        overlapping = any(set(chain.names) & set(other.names) for other in kept)
        inside = any(
            name.startswith(f"{block}.")
            for other in chains
            for block in other.names
            for name in chain.names
            if block != name
        )
        if not overlapping and not inside:
            kept.append(chain)
    return [chain for chain in chains if chain in kept]


def is_checkpointing_layer(module: nn.Module) -> bool:
    """Whether transformers marks the class as a block (`GradientCheckpointingLayer`), told without importing transformers."""
    return any(parent.__name__ == "GradientCheckpointingLayer" for parent in type(module).__mro__)


def _repeated(names: tuple[str, ...], calls: list[Call]) -> tuple[str, ...]:
    return tuple(name for name in names if sum(call.block == name for call in calls) > 1)


def _runs(calls: list[Call]) -> Iterator[list[Call]]:
    run: list[Call] = []
    for call in calls:
        if run and not run[-1].feeds(call):
            yield run
            run = []
        run.append(call)
    if run:
        yield run


def _watch(shadow: nn.Module, found: Trace) -> None:
    names = {id(module): name for name, module in reversed(list(shadow.named_modules()))}
    for list_name, elements in module_lists(shadow).items():
        for element in dict.fromkeys(elements):
            block = names[id(element)]

            def record(
                module: nn.Module,
                args: tuple[object, ...],
                kwargs: dict[str, object],
                output: object,
                list_name: str = list_name,
                block: str = block,
            ) -> None:
                inputs = tuple(tensors_in((args, kwargs)))
                found.calls.setdefault(list_name, []).append(Call(block, inputs, next(tensors_in(output), None)))

            element.register_forward_hook(record, with_kwargs=True)


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif is_dataclass(value):
        for item in fields(value):
            yield from tensors_in(getattr(value, item.name))


def with_tensors(value: object, tensors: Iterator[Tensor]) -> Any:
    """`value` with other tensors in place of its own, which come in the order of `tensors_in`. Containers of tensors are new ones of the
    same types; whatever holds no tensor is passed on as it is.
    """
    if isinstance(value, Tensor):
        return next(tensors)
    if next(tensors_in(value), None) is None:
        return value
    if isinstance(value, tuple | list):
        make: Any = getattr(type(value), "_make", type(value))  # a named tuple is not made from a sequence
        return make([with_tensors(item, tensors) for item in value])
    made: Any = copy.copy(value)
    if isinstance(value, MutableMapping):
        for key, item in value.items():
            made[key] = with_tensors(item, tensors)
    elif isinstance(value, Mapping):
        return type(made)({key: with_tensors(item, tensors) for key, item in value.items()})
    elif is_dataclass(value):
        for item in fields(value):
            object.__setattr__(made, item.name, with_tensors(getattr(value, item.name), tensors))
    return made


def prepare(shadow: nn.Module) -> None:
    """Makes the copy traceable: no dropping of whole layers, no kernel that has no meta form, no routing by data.

    Modules that call fused attention stay in training mode, so that the dropout which they would ask for can be read.
    """
    shadow.eval()
    attention = set(modules_reaching(shadow, ATTENTION_INTERFACE))
    experts = set(modules_reaching(shadow, EXPERTS_INTERFACE))
    for name, module in shadow.named_modules():
        if name in attention or calls_fused_attention(type(module)):
            module.training = True
        if name in attention:
            _use_portable_attention(module)
        if name in experts:
            # An experts module gives one output row for each token: which expert made it does not change where it flows.
            module.__dict__["forward"] = lambda hidden, *args, **kwargs: hidden.clone()


def _use_portable_attention(module: nn.Module) -> None:
    config = getattr(module, "config", None)
    chosen = getattr(config, "_attn_implementation", None)
    if isinstance(chosen, str) and chosen not in ("eager", "sdpa"):
        config._attn_implementation = "sdpa"  # type: ignore[union-attr]  # flash kernels have no meta form


_QUESTIONS = (Tensor.__bool__, Tensor.__contains__)
"""What a forward pass asks of values: is this mask all ones? is the padding token in here?"""


class Observer(TorchFunctionMode):
    """Notes which module called torch's fused attention with a dropout above zero, and answers questions about values with `branch`."""

    def __init__(self, shadow: nn.Module, found: set[str], *, branch: bool) -> None:
        super().__init__()
        self._found = found
        self._branch = branch
        self._num_answers = 0
        self._running: list[str] = []
        for name, module in shadow.named_modules():
            if module.training:
                module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name))
                module.register_forward_hook(lambda *_: self._leave())

    def _leave(self) -> None:
        self._running.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self._running:
            dropout = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
            if dropout > 0:
                self._found.add(self._running[-1])
        if func in _QUESTIONS and args[0].is_meta and self._num_answers < MAX_ANSWERS:
            self._num_answers += 1
            return self._branch
        return func(*args, **kwargs)
