"""What a compiled block keeps and takes: read from the two graphs that torch.compile would cut from the joint one.

The min-cut partitioner decides what is kept, before any kernel is written. What is taken on the way is bounded by the buffers that cannot
be fused away: what matrix products and attention kernels read and write, and what the graph returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from colossal_core._torch_private import OperatorKinds, partitioned, storage_key, tree_flatten, tree_unflatten
from colossal_core.block_memory import BlockCall, BlockMemory, Kept, MeasuredBlock, measure_eager, recomputed
from colossal_core.fake_model import DropoutInputs
from colossal_core.live_bytes import allocated


def measure_compiled(call: BlockCall, kept: Kept, budget: float, backend: str) -> MeasuredBlock:
    """As `measure_eager`, of the block as one compiled graph. backend: `inductor` or `aot_eager`."""
    eager = measure_eager(call, kept, budget)
    args, kwargs, _ = call.detached()
    leaves, structure = tree_flatten((args, kwargs))
    where = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    block = _Forward(call.block)
    named = dict(block.named_parameters())
    buffers = dict(block.named_buffers())
    dropout = DropoutInputs(call.block)
    num_held, num_tensors = len(named) + len(buffers), len(where)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        values = list(leaves)
        for index, tensor in zip(where, tensors[num_held : num_held + num_tensors], strict=True):
            values[index] = tensor
        given = dict(zip((*named, *buffers), tensors, strict=False))
        inner_args, inner_kwargs = tree_unflatten(values, structure)
        with dropout.replaced(tensors[num_held + num_tensors :]):
            output = torch.func.functional_call(block, given, inner_args, inner_kwargs)
        return tuple(leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))

    tensors = [*named.values(), *buffers.values(), *(leaves[index] for index in where), *dropout.tensors]
    graphs = partitioned(function, tensors, num_held, inductor=backend == "inductor")
    if graphs.backward is None:
        return eager
    memory = _memory(graphs.forward, graphs.backward, graphs.num_outputs, range(num_held, num_held + num_tensors))
    whole = sum(allocated(_size(node)) for node in _returned(graphs.forward)[: graphs.num_outputs])
    decided = eager.memory.kept_bytes if kept == "selective" else 0
    found = recomputed(memory, kept, min(decided, memory.kept_bytes), eager.bare_bytes, whole, len(where))
    return replace(eager, memory=found)


class _Forward(nn.Module):
    """A block without the hooks on itself, which are outside of what is compiled."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block.forward(*args, **kwargs)


def _memory(
    forward: torch.fx.GraphModule, backward: torch.fx.GraphModule, num_outputs: int, arguments: range
) -> BlockMemory:
    returned = _returned(forward)
    placeholders = [node for node in forward.graph.nodes if node.op == "placeholder"]
    inputs = {_key(node): index for index, node in enumerate(placeholders)}
    outputs = {_key(node): index for index, node in reversed(list(enumerate(returned[:num_outputs])))}
    own: dict[int, int] = {}
    saved_inputs, saved_outputs = set(), set()
    for node in returned[num_outputs:]:
        key = _key(node)
        if key in inputs:
            saved_inputs.add(inputs[key])
        elif key in outputs:
            saved_outputs.add(outputs[key])
        else:
            own[key] = allocated(_size(node))
    kept = sum(own.values())
    results = kept + sum(allocated(_size(node)) for node in returned[:num_outputs] if _key(node) not in inputs)
    return BlockMemory(
        kept_bytes=kept,
        saved_inputs=tuple(sorted(index - arguments.start for index in saved_inputs if index in arguments)),
        saved_outputs=tuple(sorted(saved_outputs)),
        forward_bytes=max(_peak(forward, {}) - results, 0),
        backward_bytes=max(_peak(backward, own) - kept, 0),
    )


def _returned(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    node = next(node for node in reversed(graph.graph.nodes) if node.op == "output")
    found: Any = node.args[0]
    return [item for item in found if isinstance(item, torch.fx.Node) and isinstance(item.meta.get("val"), Tensor)]


def _key(node: torch.fx.Node) -> int:
    return storage_key(node.meta["val"])


def _size(node: torch.fx.Node) -> int:
    value = node.meta.get("val")
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(value))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _peak(graph: torch.fx.GraphModule, held: Mapping[int, int]) -> int:
    """The most bytes at once while a graph runs. held: sizes, by storage, of inputs that are freed after their last use.

    Written to memory is what a library's kernel makes, and what is made for one or for the caller; all else lives in registers of a fused
    kernel, which keeps alive whatever it reads.
    """
    kinds = OperatorKinds()
    position = {node: index for index, node in enumerate(graph.graph.nodes)}
    written = {node for node in position if _is_written(node, kinds)}
    born: dict[int, int] = {}  # position -> bytes
    reads: dict[torch.fx.Node, frozenset[int]] = {}  # position of the node that wrote, or -1 - key of what is held
    last: dict[int, int] = {-1 - key: 0 for key in held}
    for node, index in position.items():
        read = frozenset[int]().union(*(reads[item] for item in node.all_input_nodes))
        if node.op == "placeholder":
            value = node.meta.get("val")
            key = storage_key(value) if isinstance(value, Tensor) else -1
            reads[node] = frozenset({-1 - key}) if key in held else frozenset()
            continue
        if node in written or node.op == "output":
            for item in read:
                last[item] = index
        if node in written:
            born[index] = allocated(_size(node))
            reads[node] = frozenset({index})
        else:
            reads[node] = read
    sizes = {**born, **{-1 - key: size for key, size in held.items()}}
    dying: dict[int, int] = {}
    for item, index in last.items():
        dying[index] = dying.get(index, 0) + sizes[item]
    live = peak = sum(held.values())
    for index in range(len(position)):
        live += born.get(index, 0)
        peak = max(peak, live)
        live -= dying.get(index, 0)
    return peak


def _is_written(node: torch.fx.Node, kinds: OperatorKinds) -> bool:
    if node.op != "call_function" or kinds.is_view(node):
        return False
    return not kinds.is_fusible(node) or _feeds_kernel(node, kinds)


def _feeds_kernel(node: torch.fx.Node, kinds: OperatorKinds) -> bool:
    for user in node.users:
        if user.op == "output" or (kinds.is_view(user) and _feeds_kernel(user, kinds)):
            return True
        if not kinds.is_view(user) and not kinds.is_fusible(user):
            return True
    return False
