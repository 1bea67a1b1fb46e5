"""What is measured of an op: shapes, the least work of each, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "backward", "both", "step"]
"""forward: as in training, what backward needs is kept. both: forward and backward, where an op does one's work in the other. step: an op
that changes its arguments.
"""
Function = Callable[..., Any]
GIB = 1 << 30


@dataclass(frozen=True)
class Least:
    """The least that a direction of an op has to do.

    num_bytes: moved through device memory, in each direction each input read once and each output written once. flops: of its matrix
    products, two for each multiplication, nothing computed twice; 0: bound by memory. formula: both in words. goal_ms: on an H200.
    goal_share: of the copy bandwidth for these bytes, or of the matrix rate. goal_extra_bytes: at the peak, over what there was before.
    """

    num_bytes: int
    formula: str
    flops: int = 0
    goal_ms: float | None = None
    goal_share: float | None = None
    goal_extra_bytes: int | None = None


MEMORY_GOAL = 0.85
"""Share of the bandwidth of a copy as large that an op bound by memory is to reach."""


def moved(num_bytes: int, formula: str, goal_ms: float | None = None) -> Least:
    """Of an op that is bound by memory."""
    return Least(num_bytes, formula, goal_ms=goal_ms, goal_share=MEMORY_GOAL)


def multiplied(flops: int, formula: str, goal_ms: float | None = None, goal_extra_bytes: int | None = None) -> Least:
    """Of an op that is bound by its products."""
    return Least(0, formula, flops, goal_ms, None, goal_extra_bytes)


@dataclass(frozen=True)
class Call:
    """One call of an op. Tensors that require a gradient are differentiated."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)


class Draw:
    """Random arguments on a device, the same for everyone that is compared."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator(device)
        self._generator.manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, grad: bool = True) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator, device=self.device, dtype=torch.float32).mul_(scale)
        return drawn.to(dtype).requires_grad_(grad)

    def integers(self, most: int, *shape: int) -> Tensor:
        """From 0 to below `most`, int64."""
        return torch.randint(most, shape, generator=self._generator, device=self.device)

    def labels(self, rows: int, vocabulary: int) -> Tensor:
        """[rows], every sixteenth ignored."""
        found = self.integers(vocabulary, rows)
        return found.masked_fill_(torch.arange(rows, device=self.device) % 16 == 3, -100)

    @staticmethod
    def counted(rows: int) -> int:
        """Of so many `labels`, those that are not ignored."""
        return rows - (rows + 12) // 16

    def choices(self, rows: int, most: int, count: int) -> Tensor:
        """[rows, count] different numbers below `most`, int64, some more often than others."""
        liked = torch.arange(most, device=self.device, dtype=torch.float32)
        drawn = torch.rand(rows, most, generator=self._generator, device=self.device)
        return (drawn.log().neg() * (1.0 + liked / 8.0)).topk(count, dim=1, largest=False).indices


@dataclass(frozen=True)
class Shape:
    """One call's sizes. label: as it is printed. least: by the directions that are measured. restored: the tensors are given back their
    first values before each call, for a call that overwrites them.
    """

    label: str
    call: Callable[[Draw], Call]
    least: Mapping[Direction, Least]
    restored: bool = False


@dataclass(frozen=True)
class Knobs:
    """Settings of a kernel that a GPU is asked about. directions: on which they have an effect.

    values: all that are tried, by place in this package: `norms.config:PROGRAMS` is a module's constant, `norms.config:forward_config` a
    function, in whose place the value is given whatever is asked (unless the value is a function too), `norms.config:forward_config.warps`
    a field of the dataclass that the function returns.
    """

    directions: tuple[Direction, ...]
    values: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class OpBench:
    """One op. shapes: three realistic ones, the one of the goals first.

    eager: what a user of torch alone would call. formula: written plainly, for torch.compile; None: eager is. peers: of other packages, by
    name, each a function that imports it and returns what to call. All have the op's own signature. cpu_shapes: of an op that has a
    kernel for the CPU. compared: the dtype in which the reference gives the truth, or nothing, where a wider dtype means another
    computation. knobs: what `sweep` tries. ours, reference: of what is no op of the registry but made of several.
    """

    op: str
    shapes: tuple[Shape, ...]
    eager: Function | None = None
    formula: Function | None = None
    peers: Mapping[str, Callable[[], Function]] = field(default_factory=dict)
    cpu_shapes: tuple[Shape, ...] = ()
    compared: Literal["float64", "float32", "nothing"] = "float64"
    knobs: tuple[Knobs, ...] = ()
    ours: Callable[[], Function] | None = None
    reference: Function | None = None

    def shapes_on(self, device_type: str) -> tuple[Shape, ...]:
        return self.cpu_shapes if device_type == "cpu" else self.shapes


def name_of(dtype: torch.dtype) -> str:
    """As tables have it."""
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
    return short.get(dtype, str(dtype).removeprefix("torch."))


def times(*sizes: int) -> str:
    return " x ".join(str(size) for size in sizes)
