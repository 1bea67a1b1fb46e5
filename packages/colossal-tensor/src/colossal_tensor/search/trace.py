"""One forward pass of a small model, watched: what each product with a parameter reads, and where its result goes.

Every tensor's *sources* are followed through the operators: `STREAM` for the activations between blocks, the full name of a parameter for
the result of a matrix product with it. A product starts afresh, every other operator passes on the union, and what meets the stream
becomes stream. So the sources of a product's input name the products right before it. Nothing is asked for by class or name of a module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from colossal_core._torch_private import OpOverload, TorchDispatchMode
from colossal_tensor.search.operator_kinds import FACTORIES, OPERANDS, is_one_by_one, writes_its_first
from colossal_tensor.search.reads import Read, recorded_reads

STREAM = ""
"""The source that stands for the activations between blocks."""
MIXED = "#"
"""Marks a tensor on whose way features met one another otherwise than one by one: a softmax, a product of activations, a mean."""


@dataclass(frozen=True)
class Product:
    """A matrix product with a parameter. contracted: its dimensions that are summed over; kept: those that the result has; batched: those
    along which both have one entry a batch (experts, heads). sources: of the activations, without its own. module: the one whose forward
    was running. label: what its result is known by: the parameter, or the weight that an adapter belongs to. second: it reads the result
    of another product of the same label (an adapter's way out).
    """

    parameter: str
    label: str
    second: bool
    contracted: int
    kept: int
    batched: int | None
    sources: frozenset[str]
    module: str


@dataclass(frozen=True)
class Argument:
    """A tensor that a module was called with: by position ("0") or keyword. Only its sources make it part of the stream; whole numbers that
    were made of the stream (the chosen experts of each token) are part of it too. storage: equal for arguments that are the same tensor.
    """

    module: str
    key: str
    shape: tuple[int, ...]
    floating: bool
    sources: frozenset[str]
    storage: int


@dataclass
class Trace:
    """What was seen. products: in order of execution. met: for every other parameter, the sources of what it was combined with. merged:
    products whose result met the stream, or left a block. arguments, outputs: of every call of a module, outputs by their index.
    reads: integers that forward passes read. calls: modules in order of first call.
    """

    products: list[Product] = field(default_factory=list)
    met: dict[str, set[str]] = field(default_factory=dict)
    merged: set[str] = field(default_factory=set)
    arguments: list[Argument] = field(default_factory=list)
    outputs: list[tuple[str, int, tuple[int, ...], frozenset[str]]] = field(default_factory=list)
    reads: tuple[Read, ...] = ()
    calls: dict[str, int] = field(default_factory=dict)


def trace_model(model: nn.Module, batch: Mapping[str, Any], blocks: Iterable[str]) -> Trace:
    """Runs `model(**batch)` once. The model is changed (its modules' classes record what is read): give one that is not used again."""
    watcher = _Watcher(model, frozenset(blocks))
    with recorded_reads(model) as reads, watcher:
        watcher.enter_inputs(batch.values())
        model(**batch)
    watcher.trace.reads = tuple(dict.fromkeys(reads))
    return watcher.trace


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows sources by storage, so that a view shares those of its base and a write through a view reaches it."""

    def __init__(self, model: nn.Module, blocks: frozenset[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self._blocks = blocks
        self._sources: dict[int, tuple[object, frozenset[str]]] = {}
        self._derived: dict[int, tuple[object, frozenset[str]]] = {}
        self._chosen: dict[int, object] = {}
        self._parameters: dict[int, tuple[str, Tensor]] = {}
        self._stack: list[str] = []
        for name, parameter in model.named_parameters():
            self._parameters[_storage(parameter)] = (name, parameter)
        self._adapted = {
            f"{name}.{own}": f"{name}.base_layer.weight"
            for name, module in model.named_modules()
            if isinstance(getattr(module, "base_layer", None), nn.Module)
            for own, _ in module.named_parameters()
        }
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(_Before(self, name), with_kwargs=True, prepend=True)
                module.register_forward_hook(_After(self, name))

    def enter_inputs(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point():
                self._set(value, frozenset({STREAM}))

    def before(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._stack.append(name)
        self.trace.calls.setdefault(name, len(self.trace.calls))
        given = [*((str(index), value) for index, value in enumerate(args)), *kwargs.items()]
        tensors = [(key, value) for key, value in given if isinstance(value, Tensor)]
        if name in self._blocks:
            self._enter_block(tensors)
        for key, value in tensors:
            shape, floating = tuple(value.shape), value.is_floating_point()
            sources = frozenset({STREAM}) if _storage(value) in self._chosen else self.of(value)
            self.trace.arguments.append(Argument(name, key, shape, floating, sources, _storage(value)))

    def _enter_block(self, tensors: list[tuple[str, Tensor]]) -> None:
        """What comes from outside every block is stream; what an earlier block made for this one's inside keeps its sources."""
        for _, value in tensors:
            known = self.of(value) - {MIXED}
            if known and not any(self._in_block(label) for label in known):
                self._set(value, frozenset({STREAM}))

    def _in_block(self, label: str) -> bool:
        return any(label.startswith(block + ".") for block in self._blocks)

    def after(self, name: str, output: Any) -> None:
        self._stack.pop()
        parts = output if isinstance(output, (tuple, list)) else [output]
        if name in self._blocks:
            first = next((part for part in parts if isinstance(part, Tensor) and part.is_floating_point()), None)
            if first is not None:
                self.trace.merged |= self.of(first)
                self._set(first, frozenset({STREAM}))
        for index, part in enumerate(parts):
            if isinstance(part, Tensor) and part.is_floating_point():
                self.trace.outputs.append((name, index, tuple(part.shape), self.of(part)))

    def of(self, value: Tensor) -> frozenset[str]:
        found = self._sources.get(_storage(value))
        return found[1] if found else frozenset()

    def _set(self, value: Tensor, sources: frozenset[str]) -> None:
        self._sources[_storage(value)] = (value.untyped_storage(), sources)

    def _made_of(self, value: Tensor) -> frozenset[str]:
        """The parameters that a tensor is made of, where nothing else is in it."""
        own = self._parameters.get(_storage(value))
        if own is not None:
            return frozenset({own[0]})
        found = self._derived.get(_storage(value))
        return found[1] if found else frozenset()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            given = list(_tensors((args, kwargs or {})))
            results = list(_tensors(result))
            made = [tensor for tensor in results if _floating(tensor)]
            if not self._product(func, args, made):
                self._combine(func, given, made)
            self._choose(given, [tensor for tensor in results if not _floating(tensor)])
        return result

    def _product(self, func: OpOverload, args: tuple[Any, ...], made: list[Tensor]) -> bool:
        """Records a matrix product of activations with a parameter; False where it is none."""
        operands = OPERANDS.get(func.overloadpacket.__name__)
        if operands is None:
            return False
        left, right = (args[index] for index in operands)
        for weight, activation, contracted in ((right, left, -2), (left, right, -1)):
            own = self._parameters.get(_storage(weight))
            sources = self.of(activation)
            if own is None or not sources:
                continue
            name, parameter = own
            dims = _dims_of(weight, parameter)
            kept = -1 if contracted == -2 else -2
            batched = dims[0] if len(dims) == 3 else None
            summed, left_over = dims[contracted], dims[kept]
            if summed is None or left_over is None or (len(dims) == 3 and self._is_by_head(name, sources)):
                return False
            label = self._adapted.get(name, name)
            self.trace.products.append(
                Product(
                    name,
                    label,
                    label in sources,
                    summed,
                    left_over,
                    batched,
                    sources - {label},
                    self._where(),
                )
            )
            rest = [value for index, value in enumerate(args) if isinstance(value, Tensor) and index not in operands]
            for value in rest:
                for bias in self._made_of(value):
                    self.trace.met.setdefault(bias, set()).add(label)
            for tensor in made:
                self._set(tensor, frozenset({label}))
            return True
        return False

    def _is_by_head(self, name: str, sources: frozenset[str]) -> bool:
        """A batched product with one matrix for each head is no product over the features that are cut: its input is cut already."""
        own = name.rpartition(".")[0]
        return STREAM not in sources and not any(source.rpartition(".")[0] == own for source in sources)

    def _choose(self, given: list[Tensor], chosen: list[Tensor]) -> None:
        """Whole numbers that depend on activations."""
        if chosen and any(_storage(tensor) in self._chosen or self.of(tensor) for tensor in given):
            for tensor in chosen:
                self._chosen[_storage(tensor)] = tensor.untyped_storage()

    def _where(self) -> str:
        return self._stack[-1] if self._stack else ""

    def _combine(self, func: OpOverload, given: list[Tensor], made: list[Tensor]) -> None:
        if func.overloadpacket.__name__ in FACTORIES:
            return
        if func.overloadpacket.__name__ == "embedding" and not any(name in self._blocks for name in self._stack):
            for tensor in made:
                self._set(tensor, frozenset({STREAM}))
            return
        parameters = frozenset().union(*(self._made_of(tensor) for tensor in given))
        sources = frozenset().union(*(self.of(tensor) for tensor in given))
        written = [tensor for index, tensor in enumerate(given) if index == 0 and writes_its_first(func)]
        if not sources:
            if parameters:
                for tensor in [*made, *written]:
                    self._derived[_storage(tensor)] = (tensor.untyped_storage(), parameters)
            return
        for parameter in parameters:
            self.trace.met.setdefault(parameter, set()).update(sources)
        if STREAM in sources:
            self.trace.merged |= sources - {STREAM, MIXED}
            sources = frozenset({STREAM})
        elif not is_one_by_one(func):
            sources |= {MIXED}
        for tensor in [*made, *(tensor for tensor in written if _floating(tensor))]:
            self._set(tensor, sources)


class _Before:
    def __init__(self, watcher: _Watcher, name: str) -> None:
        self._watcher, self._name = watcher, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._watcher.before(self._name, args, kwargs)


class _After:
    def __init__(self, watcher: _Watcher, name: str) -> None:
        self._watcher, self._name = watcher, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._watcher.after(self._name, output)


def _floating(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _dims_of(view: Tensor, parameter: Tensor) -> list[int | None]:
    """For each dimension of a view of a parameter, the parameter's dimension that it runs along, told by its stride."""
    strides = {stride: dim for dim, stride in reversed(list(enumerate(parameter.stride()))) if parameter.shape[dim] > 1}
    return [strides.get(stride) for stride in view.stride()]
