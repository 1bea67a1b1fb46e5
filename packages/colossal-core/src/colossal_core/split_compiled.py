"""Compiling blocks whose backward passes will be cut in two: the backends `inductor` and `aot_eager`, with two backward graphs for one.

A compiled graph is one node of autograd's graph. Where a split backward pass meets it (`split_backward.SplitBackward`), the node runs the
first part and leaves the second to it; in any other backward pass it runs both. Blocks of the same code share the compiled graphs:
which gradient belongs to which parameter is read from the node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from colossal_core._torch_private import CompilePart, compile_cutting, running_node
from colossal_core.backward_cut import Boxed, cut_backward, run_in_two
from colossal_core.split_backward import left_to

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def inductor_in_two(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """The backend `inductor`. One function, not one for each block: Dynamo takes the graphs of one backend for every block of a code."""
    return _compiled("inductor", graph, example_inputs)


def aot_eager_in_two(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """The backend `aot_eager`: the same graphs and the same cut, run operator by operator."""
    return _compiled("aot_eager", graph, example_inputs)


IN_TWO: Mapping[str, Backend | str] = MappingProxyType(
    {"inductor": inductor_in_two, "aot_eager": aot_eager_in_two, "eager": "eager"}
)
"""By name, the backends for a program that cuts backward passes. `eager` leaves autograd's own graph, which is cut as ever."""


def _compiled(backend: str, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    parameters = frozenset(index for index, one in enumerate(example_inputs) if isinstance(one, torch.nn.Parameter))
    tensors = [index for index, one in enumerate(example_inputs) if isinstance(one, Tensor)]
    way = {index: position for position, index in enumerate(tensors)}  # a node has one way out for each tensor

    def leave(rest: Callable[[], Sequence[Any]], outputs: tuple[int, ...]) -> bool:
        return left_to(running_node(), rest, tuple(way[output] for output in outputs), len(way))

    def backward(module: fx.GraphModule, inputs: Sequence[Any], compile_part: CompilePart) -> Boxed | None:
        cut = cut_backward(module, parameters, len(example_inputs))
        if cut is None:
            return None
        first, strides = compile_part(cut.inputs, [inputs[index] for index in cut.input_arguments])
        kept = _made(cut.inputs, strides)[len(cut.input_outputs) :]
        second, _ = compile_part(cut.weights, [*(inputs[index] for index in cut.weight_arguments), *kept])
        return run_in_two(cut, first, second, leave)

    return compile_cutting(backend, graph, example_inputs, backward)


def _made(graph: fx.GraphModule, strides: Sequence[Sequence[Any] | None] | None) -> list[Any]:
    """What a graph returns, without values, in the strides of its compiled form."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    values: list[Any] = [node.meta["val"] for node in output.args[0]]
    for index, stride in enumerate(strides or ()):
        value = values[index]
        if isinstance(value, Tensor) and stride is not None and tuple(value.stride()) != tuple(stride):
            values[index] = value.as_strided(value.size(), tuple(stride))
    return values
