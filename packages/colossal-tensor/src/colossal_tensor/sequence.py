"""Sequence parallelism: between the groups each rank has its part of the sequence (Korthikanti et al. 2022, section 4.2).

Activations on the stream are [B, S/n, D], cut on dim 1, or [tokens, D] where a module has flattened them: then the tokens of each rank stay
together, which is right for whatever treats tokens one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from colossal_core.errors import ColossalError
from colossal_tensor.group import Stream, expand, matches
from colossal_tensor.hooks import ArgumentHook, OutputHook
from colossal_tensor.layouts import AXIS

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives, Cotangent

SEQUENCE_DIM = 1


def sequence_dim(value: torch.Tensor) -> int:
    """The dimension of the stream along which ranks have different positions."""
    return SEQUENCE_DIM if value.ndim > 2 else 0


def install_stream(model: nn.Module, stream: Stream, collectives: Collectives) -> None:
    """Cuts the stream where it enters the blocks, and makes it whole where it leaves them (after the last block each rank computes the same
    with it; at a head that is cut its gradient is a summand on each) and around modules that every rank computes alike.
    """
    part, alike = Part(collectives, "sequence"), Whole(collectives, "replicated", "sequence")
    for entry in stream.entries:
        ArgumentHook(entry.arguments, part).install(model.get_submodule(entry.module))
    for exit_ in stream.exits:
        OutputHook(alike, exit_.output).install(model.get_submodule(exit_.module))
    at_head = Whole(collectives, "partial", "head")
    for entry in stream.gathered_at:
        ArgumentHook(entry.arguments, at_head).install(model.get_submodule(entry.module))
    names = [name for name, _ in model.named_modules()]
    for entry in stream.whole:
        for name in expand(entry.module, names):
            module = model.get_submodule(name)
            ArgumentHook(entry.arguments, Whole(collectives, "replicated", "whole")).install(module)
            OutputHook(Part(collectives, "whole")).install(module)


def is_inside_whole(stream: Stream, name: str) -> bool:
    """Whether a module is, or is inside, one that every rank computes on the whole sequence."""
    parts = name.split(".")
    outer = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return any(matches(entry.module, module) for entry in stream.whole for module in outer)


@dataclass(frozen=True)
class Whole:
    """The whole sequence from every rank's part. Backward: this rank's part of a gradient that all have (`replicated`: no message), or of
    the sum of theirs (`partial`: a reduce-scatter).
    """

    collectives: Collectives
    cotangent: Cotangent
    tag: str

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return self.collectives.all_gather(value, AXIS, dim=sequence_dim(value), cotangent=self.cotangent, tag=self.tag)


@dataclass(frozen=True)
class Part:
    """This rank's part of the sequence. Backward: an all-gather."""

    collectives: Collectives
    tag: str

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        size, ranks = value.shape[sequence_dim(value)], self.collectives.size(AXIS)
        if size % ranks:
            message = (
                f"batch: a sequence of {size} positions is not divided by parallel.tensor.size={ranks}: "
                f"pad it to {-(-size // ranks) * ranks}, or set parallel.tensor.sequence_parallel: false; "
                "to generate, load what export_hf writes"
            )
            raise ColossalError(message)
        part = self.collectives.own_range(value, AXIS, dim=sequence_dim(value), tag=self.tag)
        return part.contiguous()  # models take the stream's `view`
