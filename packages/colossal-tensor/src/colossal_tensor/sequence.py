"""Sequence parallelism: between the groups each rank has its part of the sequence (Korthikanti et al. 2022, section 4.2).

Activations on the stream are [B, S/n, D], cut on dim 1, or [tokens, D] where a module has flattened them: then the tokens of each rank stay
together, which is right for whatever treats tokens one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from colossal_core.errors import ColossalError
from colossal_tensor.group import Stream, expand, matches
from colossal_tensor.layouts import AXIS

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

SEQUENCE_DIM = 1


def sequence_dim(value: torch.Tensor) -> int:
    """The dimension of the stream along which ranks have different positions."""
    return SEQUENCE_DIM if value.ndim > 2 else 0


def install_stream(model: nn.Module, stream: Stream, collectives: Collectives) -> None:
    """Cuts the stream where it enters the blocks and makes it whole where it leaves them."""
    for entry in stream.entries:
        cut = CutHook(collectives, entry.arguments)
        model.get_submodule(entry.module).register_forward_pre_hook(cut.before, with_kwargs=True)
    for exit_ in stream.exits:
        gather = GatherHook(collectives, exit_.output)
        model.get_submodule(exit_.module).register_forward_hook(gather.after)
    for entry in stream.gathered_at:
        late = LateGatherHook(collectives, entry.arguments)
        model.get_submodule(entry.module).register_forward_pre_hook(late.before, with_kwargs=True)
    names = [name for name, _ in model.named_modules()]
    for entry in stream.whole:
        for name in expand(entry.module, names):
            module = model.get_submodule(name)
            module.register_forward_pre_hook(WholeHook(collectives, entry.arguments).before, with_kwargs=True)
            module.register_forward_hook(PartHook(collectives).after)


def is_inside_whole(stream: Stream, name: str) -> bool:
    """Whether a module is, or is inside, one that every rank computes on the whole sequence."""
    parts = name.split(".")
    outer = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return any(matches(entry.module, module) for entry in stream.whole for module in outer)


@dataclass(frozen=True)
class WholeHook:
    """Before a module that every rank computes alike: the whole sequence. Backward: this rank's part of the gradient, no message."""

    collectives: Collectives
    arguments: tuple[str, ...]

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        return with_arguments(args, kwargs, self.arguments, self._whole)

    def _whole(self, value: torch.Tensor) -> torch.Tensor:
        dim = sequence_dim(value)
        return self.collectives.all_gather(value, AXIS, dim=dim, cotangent="replicated", tag="whole")


@dataclass(frozen=True)
class PartHook:
    """After it: this rank's part of its first tensor. Backward: an all-gather."""

    collectives: Collectives

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        if isinstance(output, torch.Tensor):
            return self._part(output)
        parts = list(output)
        parts[0] = self._part(parts[0])
        return tuple(parts)

    def _part(self, value: torch.Tensor) -> torch.Tensor:
        part = self.collectives.own_range(value, AXIS, dim=sequence_dim(value), tag="whole")
        return part.contiguous()  # models take the stream's `view`


@dataclass(frozen=True)
class CutHook:
    """Before the first block: this rank's part of the sequence. Backward: an all-gather."""

    collectives: Collectives
    arguments: tuple[str, ...]

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        return with_arguments(args, kwargs, self.arguments, self._part)

    def _part(self, value: torch.Tensor) -> torch.Tensor:
        size, ranks = value.shape[sequence_dim(value)], self.collectives.size(AXIS)
        if size % ranks:
            message = (
                f"batch: a sequence of {size} positions is not divided by parallel.tensor.size={ranks}: "
                f"pad it to {-(-size // ranks) * ranks}, or set parallel.tensor.sequence_parallel: false; "
                "to generate, load what export_hf writes"
            )
            raise ColossalError(message)
        part = self.collectives.own_range(value, AXIS, dim=sequence_dim(value), tag="sequence")
        return part.contiguous()  # models take the stream's `view`


@dataclass(frozen=True)
class GatherHook:
    """After the last block: the whole sequence on every rank, each of which computes the same with it. Backward: its own part."""

    collectives: Collectives
    output: int

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        if isinstance(output, torch.Tensor):
            return self._whole(output)
        parts = list(output)
        parts[self.output] = self._whole(parts[self.output])
        return tuple(parts)

    def _whole(self, value: torch.Tensor) -> torch.Tensor:
        dim = sequence_dim(value)
        return self.collectives.all_gather(value, AXIS, dim=dim, cotangent="replicated", tag="sequence")


@dataclass(frozen=True)
class LateGatherHook:
    """Before a head that is cut itself: the whole sequence, whose gradient is a summand on each rank. Backward: a reduce-scatter."""

    collectives: Collectives
    arguments: tuple[str, ...]

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        return with_arguments(args, kwargs, self.arguments, self._whole)

    def _whole(self, value: torch.Tensor) -> torch.Tensor:
        return self.collectives.all_gather(value, AXIS, dim=sequence_dim(value), cotangent="partial", tag="head")


def with_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], arguments: tuple[str, ...], change: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with some of them changed, by position or keyword."""
    changed = list(args)
    for argument in arguments:
        if argument.isdigit():
            changed[int(argument)] = change(changed[int(argument)])
        else:
            kwargs = {**kwargs, argument: change(kwargs[argument])}
    return tuple(changed), kwargs
