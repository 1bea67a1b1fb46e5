"""What one block of a model takes in a training step: measured once on fake tensors, then stood in for by a block of the same size.

Blocks of equal structure are measured once, so that a model of a hundred blocks takes as long as one of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Literal, TypeGuard, cast

import torch
from torch import Tensor, nn

from colossal_core._torch_private import storage_key, tree_flatten, tree_unflatten
from colossal_core.dataflow import tensors_in
from colossal_core.live_bytes import LiveBytes, allocated
from colossal_core.recompute import without_cache
from colossal_core.selective import BlockTrace, OperationRecorder, decide

Kept = Literal["none", "full", "selective"]


@dataclass(frozen=True)
class Output:
    """One leaf of what a block returns. input: index of the input tensor that it is; -1: a tensor of its own. value: what is no tensor."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    requires_grad: bool = False
    input: int = -1
    value: Any = None
    is_tensor: bool = True


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one call of a block. kept_bytes: from its forward to its backward pass, beyond parameters, inputs and outputs.

    saved_inputs, saved_outputs: indices of tensors that live on because the block keeps them. forward_bytes: the most that its forward
    pass takes beyond what it keeps and returns. backward_bytes: the most that its backward pass takes beyond what was kept, the gradients
    that it gives included.
    """

    kept_bytes: int
    saved_inputs: tuple[int, ...]
    saved_outputs: tuple[int, ...]
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class MeasuredBlock:
    """A block's memory, and what a stand-in needs to return the like of its output. bare_bytes: what its forward pass takes on the way
    where nothing is kept of it; 0 where that was not asked for.
    """

    memory: BlockMemory
    outputs: tuple[Output, ...]
    structure: Any
    bare_bytes: int = 0


class BlockCall:
    """One call of a block on fake tensors. inputs: its tensors, depth first; parameters: the trained ones."""

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.block = block
        self.args = without_cache(args)
        self.kwargs = without_cache(dict(kwargs))
        self.inputs = tuple(tensors_in((self.args, self.kwargs)))
        self.parameters = tuple(parameter for parameter in block.parameters() if parameter.requires_grad)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for calls that take the same memory: class, shapes, every attribute that is no number of a layer, and what strategies have
        put on the modules inside.
        """
        leaves, structure = tree_flatten((self.args, self.kwargs))
        described = tuple(_described(leaf) for leaf in leaves)
        parts = tuple(
            (type(module), module.training, tuple(sorted(_plain(module))), module is self.block or _put_on(module))
            for module in self.block.modules()
        )
        tensors = (*self.block.named_parameters(), *self.block.named_buffers())
        return (parts, tuple((name, _described(tensor)) for name, tensor in tensors), described, str(structure))

    def detached(self) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]:
        """Arguments on the same storages, cut off from the graph that made them, and their tensors."""
        leaves, structure = tree_flatten((self.args, self.kwargs))
        fresh: dict[int, Tensor] = {}
        for tensor in self.inputs:
            fresh.setdefault(id(tensor), tensor.detach().requires_grad_(tensor.requires_grad))
        args, kwargs = tree_unflatten([fresh.get(id(leaf), leaf) for leaf in leaves], structure)
        return args, kwargs, tuple(tensors_in((args, kwargs)))


def _described(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.requires_grad)
    return leaf if isinstance(leaf, bool | int | float | str | None) else type(leaf)


def _plain(module: nn.Module) -> Iterator[tuple[str, object]]:
    for name, value in vars(module).items():
        if isinstance(value, bool | float | str):
            yield name, str(value)


def _put_on(module: nn.Module) -> tuple[object, ...]:
    """Kinds of hooks, and of what stands in the place of the class's forward."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values(), vars(module).get("forward"))
    return tuple(
        type(getattr(hook, "__self__", hook) if not _is_method_of(hook, module) else hook.__func__) for hook in hooks
    )


def _is_method_of(hook: object, module: nn.Module) -> TypeGuard[MethodType]:
    return isinstance(hook, MethodType) and hook.__self__ is module


def measure_eager(call: BlockCall, kept: Kept, budget: float) -> MeasuredBlock:
    """Runs forward and backward once. kept, budget: what `recompute` keeps of the block, as in its config."""
    args, kwargs, inputs = call.detached()
    counted = LiveBytes()
    counted.ignore((*call.block.parameters(), *call.block.buffers(), *inputs))
    keys = [storage_key(tensor) for tensor in inputs]
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(storage_key(tensor))
        return tensor

    with counted, OperationRecorder() as recorder:
        with torch.autograd.graph.saved_tensors_hooks(pack, _same), torch.enable_grad(), counted.window() as forward:
            output: Any = call.block.forward(*args, **kwargs)
        operations, counts = tuple(recorder.operations), tuple(recorder.counts.items())
        leaves, structure = tree_flatten(output)
        outputs = tuple(_output(leaf, keys) for leaf in leaves)
        own = [leaf for leaf, found in zip(leaves, outputs, strict=True) if found.is_tensor and found.input < 0]
        sizes = {storage_key(leaf): allocated(leaf.untyped_storage().nbytes()) for leaf in own if counted.holds(leaf)}
        kept_outputs = tuple(index for index, leaf in enumerate(own) if storage_key(leaf) in saved)
        still_there = sum(size for key, size in sizes.items() if key in saved)
        edges = [torch.autograd.graph.get_gradient_edge(leaf) for leaf in own if leaf.requires_grad]
        with counted.paused():
            gradients = [torch.empty_like(leaf) for leaf in own if leaf.requires_grad]
        counted.ignore(gradients)
        del output, leaves, own  # only the graph holds them now, as when the block after this one has run
        start = counted.current
        wanted = [tensor for tensor in (*inputs, *call.parameters) if tensor.requires_grad]
        with counted.window() as backward:
            if edges and wanted:
                torch.autograd.grad(edges, wanted, gradients, allow_unused=True)
    memory = BlockMemory(
        kept_bytes=start - still_there,
        saved_inputs=tuple(index for index, key in enumerate(keys) if key in saved),
        saved_outputs=kept_outputs,
        forward_bytes=forward.peak - forward.end,
        backward_bytes=backward.peak - start,
    )
    trace = BlockTrace(operations, memory.kept_bytes, counts)
    decided = decide(trace, budget).kept_bytes if kept == "selective" else 0
    bare = _forward_alone(call) if kept != "none" else 0
    found = recomputed(memory, kept, decided, bare, sum(sizes.values()), len(inputs))
    return MeasuredBlock(found, outputs, structure, bare)


def _forward_alone(call: BlockCall) -> int:
    """The most that a forward pass takes beyond its outputs when nothing is kept for a backward pass."""
    args, kwargs, inputs = call.detached()
    counted = LiveBytes()
    counted.ignore((*call.block.parameters(), *call.block.buffers(), *inputs))
    with counted, torch.no_grad(), counted.window() as forward:
        output: Any = call.block.forward(*args, **kwargs)
    del output
    return forward.peak - forward.end


def recomputed(
    memory: BlockMemory, kept: Kept, decided: int, bare: int, output_bytes: int, num_inputs: int
) -> BlockMemory:
    """The same block when its forward pass is run again in the backward pass. decided: bytes that a selective decision keeps all the same.
    bare: what the first run takes on the way when it keeps nothing, what is kept of it included.

    Every input is kept, for the second run. The backward pass then holds what is otherwise kept, and passes the peaks of both runs.
    """
    if kept == "none":
        return memory
    again = memory.kept_bytes - decided
    return replace(
        memory,
        kept_bytes=decided,
        saved_inputs=tuple(range(num_inputs)),
        saved_outputs=(),
        forward_bytes=max(bare - decided, 0),
        backward_bytes=again + output_bytes + max(memory.forward_bytes, memory.backward_bytes),
    )


def _output(leaf: object, inputs: list[int]) -> Output:
    if not isinstance(leaf, Tensor):
        return Output(value=leaf, is_tensor=False)
    key = storage_key(leaf)
    if key in inputs and leaf.grad_fn is None:
        return Output(input=inputs.index(key))
    return Output(tuple(leaf.shape), leaf.dtype, leaf.requires_grad)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def stand_in(block: nn.Module, measured: Callable[[BlockCall], MeasuredBlock]) -> None:
    """Replaces `block.forward`: it takes the memory that was measured, and computes nothing."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = BlockCall(block, args, kwargs)
        found = measured(call)
        own = [output for output in found.outputs if output.is_tensor and output.input < 0]
        made = iter(_StandIn.apply(found, len(call.inputs), *call.inputs, *call.parameters)) if own else iter(())  # type: ignore[no-untyped-call]
        leaves = []
        for output in found.outputs:
            if not output.is_tensor:
                leaves.append(output.value)
            else:
                leaves.append(call.inputs[output.input] if output.input >= 0 else next(made))
        return tree_unflatten(leaves, found.structure)

    vars(block)["forward"] = forward


class _StandIn(torch.autograd.Function):
    """Allocates and frees what a `BlockMemory` says."""

    @staticmethod
    def forward(ctx: Any, measured: MeasuredBlock, num_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        memory = measured.memory
        own = [output for output in measured.outputs if output.is_tensor and output.input < 0]
        outputs = tuple(torch.empty(output.shape, dtype=output.dtype, device="cpu") for output in own)
        kept = [_bytes(memory.kept_bytes)] if memory.kept_bytes else []
        _bytes(memory.forward_bytes)
        ctx.save_for_backward(*kept, *(tensors[index] for index in memory.saved_inputs))
        ctx.kept_outputs = [outputs[index].detach() for index in memory.saved_outputs]
        ctx.mark_non_differentiable(
            *(tensor for tensor, output in zip(outputs, own, strict=True) if not output.requires_grad)
        )
        ctx.backward_bytes = memory.backward_bytes
        ctx.inputs = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        del gradients
        needed = ctx.needs_input_grad[2:]
        made = [
            torch.empty(shape, dtype=dtype, device="cpu") if needs else None
            for (shape, dtype), needs in zip(ctx.inputs, needed, strict=True)
        ]
        given = sum(gradient.nbytes for gradient in made if gradient is not None)
        _bytes(max(ctx.backward_bytes - given, 0))
        ctx.kept_outputs = []
        return cast("tuple[Tensor | None, ...]", (None, None, *made))


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cpu")
