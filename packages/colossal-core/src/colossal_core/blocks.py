"""Running one block of one microbatch, in the parts that a program may ask for: forward, backward, or backward cut in two.

The cut (Qi et al. 2023, "Zero Bubble Pipeline Parallelism") gives the gradients of the inputs first, since another stage waits for them,
and those of the parameters later. It is made in autograd's graph, so it holds for any module: no layer is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from colossal_core.dataflow import tensors_in
from colossal_core.program import SPLIT, Part
from colossal_core.recompute import Forward, recomputation_of, without_cache
from colossal_core.split_backward import Gradients, SplitBackward

Accumulate = Callable[[nn.Parameter, Tensor], None]


class BlockRunner(Protocol):
    """Runs a block. A program that needs a part that is not in `parts` is a plan error.

    Tensors of the arguments and of the output are counted depth first; gradients stand in that order, None where there is none.
    """

    @property
    def parts(self) -> frozenset[Part]: ...

    def forward(self, microbatch: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The block's output for a microbatch, cut off from whatever made its inputs; kept until its backward part."""

    def backward(self, microbatch: int, output_gradients: Gradients) -> Gradients:
        """Gradients of the inputs; those of the parameters are accumulated."""

    def backward_input(self, microbatch: int, output_gradients: Gradients) -> Gradients:
        """Gradients of the inputs only. What `backward_weight` needs stays."""

    def backward_weight(self, microbatch: int) -> None:
        """Accumulates the gradients of the parameters, after `backward_input` of the same microbatch, and frees everything."""


def accumulate_in_grad(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Adds to `.grad`."""
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


@dataclass
class _Kept:
    """One microbatch between its parts. roots: the edges behind the outputs, whose values are not held; None where there is no graph.
    rerun: makes the outputs with a graph, where the forward pass made none; dtypes: of those.
    """

    inputs: tuple[Tensor, ...]
    roots: tuple[GradientEdge | None, ...]
    rerun: Callable[[], tuple[Tensor, ...]] | None
    split: SplitBackward | None = None
    dtypes: tuple[torch.dtype, ...] = ()


class EagerBlockRunner:
    """The runner of blocks that run as they are. accumulate: where parameter gradients go. call: what runs the block, None: calling it.

    Where the strategy `recompute` has been applied, the runner replays the block itself, once, in `backward` or `backward_input`: torch's
    checkpointing would run it again for each of the two. A compiled block recomputes in its own backward graph.
    """

    def __init__(
        self,
        block: nn.Module,
        accumulate: Accumulate = accumulate_in_grad,
        *,
        call: Callable[..., Any] | None = None,
    ) -> None:
        self.parts = SPLIT
        self._block = block
        self._call: Callable[..., Any] = block if call is None else call
        self._accumulate = accumulate
        self._recomputation = recomputation_of(block)
        self._kept: dict[int, _Kept] = {}

    def forward(self, microbatch: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        assert microbatch not in self._kept, f"microbatch {microbatch} is still waiting for its backward part"
        leaves: dict[int, Tensor] = {}
        args, kwargs = _cut_off(args, leaves), _cut_off(dict(kwargs), leaves)
        inputs = tuple(tensors_in((args, kwargs)))
        if self._recomputation is None:
            output = self._call(*args, **kwargs)
            self._kept[microbatch] = _Kept(inputs, _roots(tensors_in(output)), None)
            return _detached(output)
        args, kwargs = without_cache(args), without_cache(kwargs)
        self._recomputation.measure(args, kwargs)
        first, second = self._recomputation.contexts()
        random = _RandomState(inputs)
        with torch.no_grad(), first:
            output = self._run(args, kwargs)

        def rerun() -> tuple[Tensor, ...]:
            with torch.enable_grad(), random.restored(), second:
                return tuple(tensors_in(self._run(args, kwargs)))

        dtypes = tuple(tensor.dtype for tensor in tensors_in(output))
        self._kept[microbatch] = _Kept(inputs, (), rerun, dtypes=dtypes)
        return output

    def backward(self, microbatch: int, output_gradients: Gradients) -> Gradients:
        kept = self._with_roots(microbatch)
        parameters = self._trainable()
        wanted: list[Tensor] = [tensor for tensor in kept.inputs if tensor.requires_grad]
        roots, gradients = _reached(kept.roots, output_gradients)
        targets = [*wanted, *parameters]
        found: Gradients = (None,) * len(targets)
        if targets and roots:
            found = torch.autograd.grad(roots, targets, gradients, allow_unused=True)
        del self._kept[microbatch]
        self._add(parameters, found[len(wanted) :])
        return _aligned(kept.inputs, found[: len(wanted)])

    def backward_input(self, microbatch: int, output_gradients: Gradients) -> Gradients:
        kept = self._with_roots(microbatch)
        roots, gradients = _reached(kept.roots, output_gradients)
        wanted = [tensor for tensor in kept.inputs if tensor.requires_grad]
        kept.split = SplitBackward(roots, wanted, self._trainable())
        inputs, kept.inputs, kept.roots = kept.inputs, (), ()
        return _aligned(inputs, kept.split.input_gradients(roots, gradients))

    def backward_weight(self, microbatch: int) -> None:
        kept = self._kept.pop(microbatch)
        assert kept.split is not None, f"backward_weight of microbatch {microbatch} before its backward_input"
        parameters = self._trainable()
        self._add(parameters, kept.split.parameter_gradients())

    def differs(self, microbatch: int) -> tuple[bool, ...]:
        """Of each output of a microbatch that has run, whether a gradient of it leads anywhere."""
        kept = self._kept[microbatch]
        if kept.rerun is None:
            return tuple(root is not None for root in kept.roots)
        leads = any(tensor.requires_grad for tensor in kept.inputs) or bool(self._trainable())
        return tuple(leads and dtype.is_floating_point for dtype in kept.dtypes)

    def forget(self, microbatch: int) -> None:
        """Drops what is kept of a microbatch of which no output got a gradient, or whose step an error has ended."""
        self._kept.pop(microbatch, None)

    def has_split(self, microbatch: int) -> bool:
        """Whether the input part of a microbatch has run."""
        return self._kept[microbatch].split is not None

    def _with_roots(self, microbatch: int) -> _Kept:
        kept = self._kept[microbatch]
        if kept.rerun is not None:
            kept.roots, kept.rerun = _roots(kept.rerun()), None
        return kept

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The block with its hooks, and its own forward in the place of the one that recomputes."""
        assert self._recomputation is not None
        attributes = vars(self._block)
        installed: Forward = attributes["forward"]
        attributes["forward"] = self._recomputation.original
        try:
            return self._call(*args, **kwargs)
        finally:
            attributes["forward"] = installed

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._block.parameters() if parameter.requires_grad]

    def _add(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                self._accumulate(parameter, gradient)


def _roots(outputs: Iterable[Tensor]) -> tuple[GradientEdge | None, ...]:
    return tuple(get_gradient_edge(output) if output.requires_grad else None for output in outputs)


def _reached(roots: Sequence[GradientEdge | None], gradients: Gradients) -> tuple[list[GradientEdge], list[Tensor]]:
    """The roots that get a gradient, and those gradients."""
    pairs = [(root, one) for root, one in zip(roots, gradients, strict=True) if root is not None and one is not None]
    return [root for root, _ in pairs], [one for _, one in pairs]


def _aligned(inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Gradients:
    left = iter(gradients)
    return tuple(next(left) if tensor.requires_grad else None for tensor in inputs)


def _cut_off(value: Any, leaves: dict[int, Tensor]) -> Any:
    """The same nest with every tensor that needs a gradient replaced by a leaf; one leaf for one tensor, however often it occurs."""
    if isinstance(value, Tensor):
        if not value.requires_grad:
            return value
        return leaves.setdefault(id(value), value.detach().requires_grad_())
    return _mapped(value, lambda item: _cut_off(item, leaves))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else _mapped(value, _detached)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if type(value) in (tuple, list):
        return type(value)(change(item) for item in value)
    if type(value) is dict:
        return {key: change(item) for key, item in value.items()}
    return value


class _RandomState:
    """Torch's random state at one moment, on the CPU and on the devices of some tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A context in which this is the random state; afterwards it is what it was before."""
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
