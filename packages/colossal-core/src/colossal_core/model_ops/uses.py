"""Where a model computes what ops compute: every module that is a norm or a layer of experts, and every place in a method's source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn

from colossal_core.model_ops import experts, norms, rotations
from colossal_core.model_ops.edits import Edit, Finder
from colossal_core.model_ops.experts import Experts
from colossal_core.model_ops.head import is_plain_head
from colossal_core.model_ops.norms import Norm
from colossal_core.model_ops.proving import attributes_of
from colossal_core.model_ops.remaking import Source, methods_of, source_of

if TYPE_CHECKING:
    from types import FunctionType


@dataclass(frozen=True)
class MethodUse:
    """A method of a module, and what can be changed in it."""

    module: str
    method: str
    source: Source
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Uses:
    """What was found in one model, by names of modules. left: what is built like an op and is none, in words."""

    norms: Mapping[str, Norm]
    experts: Mapping[str, Experts]
    methods: tuple[MethodUse, ...]
    heads: tuple[str, ...]
    left: tuple[str, ...]

    @cached_property
    def modules(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the modules by op. A place that two ops can take is under both."""
        found: dict[str, dict[str, None]] = {}
        for name, norm in self.norms.items():
            found.setdefault(norm.op, {})[name] = None
        for name in self.experts:
            found.setdefault("experts", {})[name] = None
        for use in self.methods:
            for edit in use.edits:
                for op in edit.ops:
                    found.setdefault(op, {})[use.module] = None
        for name in self.heads:
            found.setdefault("linear_cross_entropy", {})[name] = None
        return {op: tuple(names) for op, names in found.items()}


@dataclass(frozen=True)
class ModelUses:
    """The uses of a model, looked for when they are first asked for, before anything is put on the model. heads: of its anatomy."""

    model: nn.Module
    heads: tuple[str, ...]

    @cached_property
    def found(self) -> Uses:
        return find_uses(self.model, self.heads)


def find_uses(model: nn.Module, heads: tuple[str, ...]) -> Uses:
    """Everything in a model that computes an op, proven place by place. The model is neither moved, called nor changed."""
    left: Counter[str] = Counter()
    found = _norms(model, left)
    by_id = {id(model.get_submodule(name)): norm for name, norm in found.items()}
    methods = tuple(_methods(model, Finder(by_id), left))
    plain = tuple(name for name in heads if is_plain_head(model, name))
    told = tuple(f"{count} x {what}" for what, count in left.items())
    return Uses(found, _experts(model), methods, plain, told)


def _norms(model: nn.Module, left: Counter[str]) -> dict[str, Norm]:
    known: dict[object, Norm | None] = {}
    found = {}
    for name, module in model.named_modules():
        if "forward" in vars(module) or not norms.is_candidate(module):
            continue
        key = norms.shape_of(module)
        if key not in known:
            known[key] = norms.find_norm(module)
        norm = known[key]
        if norm is not None:
            found[name] = norm
        elif norms.has_eps(module):
            left[f"{type(module).__name__} (no op computes it)"] += 1
    return found


def _experts(model: nn.Module) -> dict[str, Experts]:
    known: dict[object, Experts | None] = {}
    found = {}
    for name, module in model.named_modules():
        guess = next(experts.guesses(module), None) if "forward" not in vars(module) else None
        if guess is None:
            continue
        key = (type(module), repr(module), attributes_of(module), len(module.get_parameter(guess.gate_up)))
        if key not in known:
            known[key] = experts.find_experts(module)
        one = known[key]
        if one is not None:
            found[name] = one
    return found


def _methods(model: nn.Module, finder: Finder, left: Counter[str]) -> Iterator[MethodUse]:
    for name, module in model.named_modules():
        for method, function in methods_of(module):
            source = source_of(function)
            if source is None:
                continue
            edits = tuple(finder.edits(module, source))
            if edits:
                yield MethodUse(name, method, source, edits)
            for called in _unproven(source):
                left[f"{called} of {type(module).__name__} (no op computes it)"] += 1


def _unproven(source: Source) -> Iterator[str]:
    """Functions that a method calls with queries, keys and angles, and that are not the op."""
    for name, _ in rotations.calls_in(source):
        called: FunctionType | None = source.function.__globals__.get(name)
        if rotations.is_candidate(called) and rotations.find_rotation(called) is None:
            yield name
