"""Carrying a plan out on one rank's model: where activations enter and leave each group, and what the modules inside count.

Parameters are not touched here: whoever holds them gives the modules their local parts (`layouts.py` says which). A linear layer whose
output features are cut needs nothing more; one whose input features are cut gives a summand, which the group's exit adds up. What is put on
modules are hooks, inside the blocks and before they are recomputed or compiled, so both see them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from colossal_tensor.forwards import unbound
from colossal_tensor.fused import FusedEntry, FusedExit, is_product, is_transposed
from colossal_tensor.group import Entry, Exit, Group, TensorPlan, expand
from colossal_tensor.hooks import ArgumentHook, Arguments, with_arguments, with_output
from colossal_tensor.layouts import AXIS, Cutting, Placed
from colossal_tensor.matmul import SequenceMatmul, sequence_matmul
from colossal_tensor.sequence import install_stream, is_inside_whole, sequence_dim
from colossal_tensor.vocabulary import install_vocabulary

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives


def install(
    model: nn.Module, plan: TensorPlan, cutting: Cutting, collectives: Collectives, *, symmetric: bool = True
) -> None:
    """Puts the plan on a model whose modules still have their full sizes. collectives: seen through the plan's mesh. symmetric: symmetric
    memory is used where the ranks have it.

    Communication of the model afterwards, on `tp` with n ranks, for activations of A bytes at an entry or exit: without sequence
    parallelism an all-reduce at each exit and, in the backward pass, one at each entry (2 (n-1)/n A each); with it an all-gather at each
    entry and a reduce-scatter at each exit, and the same the other way round in the backward pass ((n-1)/n A each).
    """
    names = [name for name, _ in model.named_modules()]
    matmul = None
    if plan.stream is not None:
        matmul = sequence_matmul(collectives, AXIS, symmetric=symmetric, tag="tensor")
    for placed in cutting.placed:
        inside_whole = plan.stream is not None and is_inside_whole(plan.stream, placed.group.name)
        _Region(model, placed, collectives, None if inside_whole else matmul).install(names)
    install_vocabulary(model, plan, cutting, collectives)
    if plan.stream is not None:
        install_stream(model, plan.stream, collectives)


@dataclass(frozen=True)
class _Region:
    """One group on one rank. matmul: the products at its border where the sequence is cut outside of it, else None."""

    model: nn.Module
    placed: Placed
    collectives: Collectives
    matmul: SequenceMatmul | None

    def install(self, names: list[str]) -> None:
        group = self.placed.group
        for entry in group.entries:
            for name in expand(entry.module, names):
                self._enter(name, entry, names)
        for exit_ in group.exits:
            for name in expand(exit_.module, names):
                self._leave(name, exit_)
        for scaled in group.scaled:
            for name in expand(scaled.module, names):
                self._scale(self.model.get_submodule(name), scaled.attribute, shared=scaled.shared, ratio=scaled.ratio)
        self._slice(group, names)
        self._set_features(group)

    def _enter(self, name: str, entry: Entry, names: list[str]) -> None:
        module, rest = self.model.get_submodule(name), entry.arguments
        if self.matmul is not None:
            columns = [
                self.model.get_submodule(column) for pattern in entry.columns for column in expand(pattern, names)
            ]
            if columns and all(map(is_product, columns)) and len(set(map(is_transposed, columns))) == 1:
                FusedEntry(self.matmul, rest[0], tuple(columns)).install(module)
                rest = rest[1:]
        if rest:
            hook = EntryHook(self.collectives, rest, self.matmul is not None)
            module.register_forward_pre_hook(hook.before, with_kwargs=True)

    def _leave(self, name: str, exit_: Exit) -> None:
        module = self.model.get_submodule(name)
        if self.matmul is not None and is_product(module) and not exit_.gathers:
            FusedExit(self.matmul).install(module)
            return
        hook = ExitHook(self.collectives, exit_.output, self.matmul is not None, exit_.gathers)
        module.register_forward_hook(hook.after)
        self._first_rank_adds(exit_)

    def _first_rank_adds(self, exit_: Exit) -> None:
        if self.collectives.index(AXIS) == 0:
            return
        parameters = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        for pattern in exit_.biases:
            for full_name in expand(pattern, parameters):
                owner, _, attribute = full_name.rpartition(".")
                leave_out(self.model.get_submodule(owner), attribute)

    def _scale(self, module: nn.Module, attribute: str, *, shared: bool, ratio: bool) -> None:
        parts, rank = self.placed.parts, self.collectives.index(AXIS)
        holder: Any = module
        if attribute.startswith("config."):
            # Other modules read the same object: this one gets its own.
            attribute = attribute.removeprefix("config.")
            module.config = copy.deepcopy(module.config)
            holder = module.config
        number = getattr(holder, attribute)
        if ratio:
            setattr(holder, attribute, number // parts.copies)
        else:
            setattr(holder, attribute, parts.scaled(number, rank, shared=shared))

    def _slice(self, group: Group, names: list[str]) -> None:
        (start, stop), whole = self.placed.parts.of(self.collectives.index(AXIS))
        heads = self.placed.heads[0]
        for module, argument, dim in group.sliced:
            for name in expand(module, names):
                part = HeadsPart(dim, heads, (start * heads // whole, stop * heads // whole))
                ArgumentHook((argument,), part).install(self.model.get_submodule(name))

    def _set_features(self, group: Group) -> None:
        """The sizes that linear layers say of themselves: adapters and printed models read them."""
        rank = self.collectives.index(AXIS)
        for cut in group.cuts:
            owner, _, attribute = cut.parameter.rpartition(".")
            module = self.model.get_submodule(owner)
            if attribute == "weight" and isinstance(module, nn.Linear):
                which = "out_features" if cut.dim == 0 else "in_features"
                setattr(module, which, self.placed.parts.scaled(getattr(module, which), rank, shared=cut.shared))


@dataclass(frozen=True)
class EntryHook:
    """The stream enters a group: the same on every rank, its gradient a sum over them (f of Shoeybi et al. 2019, section 3)."""

    collectives: Collectives
    arguments: tuple[str, ...]
    sequence: bool

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        del module
        return with_arguments(args, kwargs, self.arguments, self._entered)

    def _entered(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if self.sequence:
            dim = sequence_dim(value)
            return self.collectives.all_gather(value, AXIS, dim=dim, cotangent="partial", tag="tensor entry")
        if not value.is_floating_point():
            return value
        return self.collectives.replicate(value, AXIS, tag="tensor entry")


@dataclass(frozen=True)
class ExitHook:
    """A group's result, a summand on each rank, becomes the sum (g of Shoeybi et al. 2019, section 3)."""

    collectives: Collectives
    output: int
    sequence: bool
    gathers: bool = False

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        return with_output(output, self.output, self._left)

    def _left(self, value: torch.Tensor) -> torch.Tensor:
        if self.gathers:
            whole = self.collectives.all_gather(value, AXIS, dim=-1, cotangent="replicated", tag="tensor exit")
            if not self.sequence:
                return whole
            return self.collectives.own_range(whole, AXIS, dim=sequence_dim(whole), tag="tensor exit").contiguous()
        if self.sequence:
            part = self.collectives.reduce_scatter(value, AXIS, dim=sequence_dim(value), tag="tensor exit")
            return part.contiguous()  # models take the stream's `view`
        return self.collectives.all_reduce(value, AXIS, cotangent="replicated", tag="tensor exit")


@dataclass(frozen=True)
class HeadsPart:
    """This rank's part of an argument that holds every head along a dimension (alone, or the heads of each sample one after another)."""

    dim: int
    heads: int
    held: tuple[int, int]

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.shape[self.dim] % self.heads:
            return value
        start, stop = self.held
        by_head = torch.unflatten(value, self.dim, (-1, self.heads))
        return by_head.narrow(self.dim + 1, start, stop - start).flatten(self.dim, self.dim + 1)


def leave_out(module: nn.Module, attribute: str) -> None:
    """Makes a module compute as if one of its parameters (a bias that another rank adds) were zero. The parameter stays where it is."""
    own = type(module).forward
    if attribute == "bias" and own is nn.Linear.forward:
        module.forward = MethodType(_linear_without_bias, module)
    elif attribute == "bias" and type(module).__name__ == "Conv1D":
        module.forward = MethodType(_conv1d_without_bias, module)
    else:
        module.forward = MethodType(_Without(attribute, unbound(module)), module)


def _linear_without_bias(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return F.linear(input, self.weight)


def _conv1d_without_bias(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.matmul(x, self.weight)


@dataclass(frozen=True)
class _Without:
    """Any module's forward with zeros in the place of one parameter."""

    attribute: str
    forward: Any

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        parameter = getattr(module, self.attribute)
        held = module._parameters
        zeros = torch.zeros_like(parameter)
        held[self.attribute] = zeros  # type: ignore[assignment]
        try:
            return self.forward(module, *args, **kwargs)
        finally:
            held[self.attribute] = parameter
