"""The backward graph of a compiled block cut in two: B makes the gradients of its inputs, W those of its parameters, from what B leaves.

What is a product only for a parameter's gradient runs in W. What else stands before such products runs where less has to be kept in
between: a minimum cut over bytes, in which W may compute once more what is cheap (element by element). Qi et al. 2023, "Zero Bubble
Pipeline Parallelism", name the two parts B and W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from colossal_core._torch_private import OperatorKinds, size_hint
from colossal_core.dataflow import tensors_in

Boxed = Callable[[list[Any]], Sequence[Any]]
"""A graph as AOTAutograd calls it: with one list of arguments, which it empties."""
Leave = Callable[[Callable[[], Sequence[Any]], tuple[int, ...]], bool]
"""Gets W with all that it needs, and the outputs of the whole that it makes. True: it will be called later. False: it is to run at once."""


@dataclass(frozen=True)
class BackwardCut:
    """Two graphs for one, which takes some arguments and returns one gradient, or None, for each argument of the forward graph.

    inputs: B, of the arguments at the positions `input_arguments`; it returns the gradients that go to `input_outputs` of the whole, then
    what it leaves. weights: W, of the arguments at the positions `weight_arguments`, then of what B has left; it returns the gradients
    that go to `weight_outputs`. kept_bytes: from B to W, parameters apart, which are there anyway (with symbolic shapes: of this example).
    """

    inputs: fx.GraphModule
    weights: fx.GraphModule
    input_arguments: tuple[int, ...]
    input_outputs: tuple[int, ...]
    weight_arguments: tuple[int, ...]
    weight_outputs: tuple[int, ...]
    num_outputs: int
    kept_bytes: int


def cut_backward(graph: fx.GraphModule, parameters: frozenset[int], num_arguments: int) -> BackwardCut | None:
    """Cuts a backward graph. parameters: which of so many arguments of the forward graph, and so which outputs, are parameters.

    None where there is nothing to leave for later, or nothing to do first, or it is not clear what belongs where: outputs that are not one
    for each argument, a step that writes into what it reads, values between the two that are no tensors.
    """
    whole = _Whole(graph, parameters)
    if whole.num_outputs != num_arguments or whole.writes or not whole.input_outputs or not whole.late:
        return None
    kept = _least_kept(whole)
    if kept is None:
        return None
    own = [node for node in kept if node.op != "placeholder"]
    weight_nodes = whole.behind(whole.weight_outputs.values(), stop=kept)
    first_nodes = whole.behind([*whole.input_outputs.values(), *whole.fixed, *own])
    number = {node: index for index, node in enumerate(whole.placeholders)}
    sizes = {node for node in number if isinstance(node.meta.get("val"), torch.SymInt)}  # in shapes, not only in nodes
    first = _ordered(number, {node for node in first_nodes if node in number} | sizes)
    second = _ordered(number, {node for node in weight_nodes if node in number} | sizes)
    return BackwardCut(
        inputs=_part(graph, whole.in_order(first_nodes), first, [*whole.input_outputs.values(), *own]),
        weights=_part(graph, whole.in_order(weight_nodes), [*second, *own], list(whole.weight_outputs.values())),
        input_arguments=tuple(number[node] for node in first),
        input_outputs=tuple(whole.input_outputs),
        weight_arguments=tuple(number[node] for node in second),
        weight_outputs=tuple(whole.weight_outputs),
        num_outputs=whole.num_outputs,
        kept_bytes=sum(_bytes(node) for node in kept if not whole.is_parameter(node)),
    )


class _Whole:
    """What is known of a backward graph before it is cut.

    input_outputs, weight_outputs: node by position of the output. early: what the gradients of inputs need, and what keeps its place
    beside them; late: products for parameters alone, and all that is computed from them.
    """

    def __init__(self, graph: fx.GraphModule, parameters: frozenset[int]) -> None:
        self.nodes = list(graph.graph.nodes)
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self._kinds = OperatorKinds()
        self._parameters = parameters
        (output,) = (node for node in self.nodes if node.op == "output")
        made: Sequence[Any] = output.args[0]
        self.num_outputs = len(made)
        found = {position: node for position, node in enumerate(made) if isinstance(node, fx.Node)}
        self.weight_outputs = {position: node for position, node in found.items() if position in parameters}
        self.input_outputs = {position: node for position, node in found.items() if position not in parameters}
        calls = [node for node in self.nodes if node.op == "call_function"]
        self.writes = any(self._kinds.writes(node) for node in calls)
        self.fixed = [node for node in calls if not self._kinds.may_move(node)]
        self.early = self.behind([*self.input_outputs.values(), *self.fixed])
        self.late: set[fx.Node] = set()
        for node in calls:  # in the order of the graph: what it reads comes before it
            heavy = node not in self.early and not self.is_cheap(node)
            if heavy or any(read in self.late for read in node.all_input_nodes):
                self.late.add(node)

    def is_cheap(self, node: fx.Node) -> bool:
        """Whether a call may be computed twice. What draws random numbers may not, though torch takes some of it for element by element."""
        if not _tensors(node):
            return True
        return self._kinds.may_move(node) and (self._kinds.is_view(node) or self._kinds.is_fusible(node))

    def is_view(self, node: fx.Node) -> bool:
        return self._kinds.is_view(node)

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether an argument is a parameter, which the forward graph took and handed on under its own name."""
        name = str(node.target)
        return (
            node.op == "placeholder"
            and name.startswith(PRIMALS)
            and name[len(PRIMALS) :].isdigit()
            and int(name[len(PRIMALS) :]) - 1 in self._parameters
        )

    def is_free(self, node: fx.Node) -> bool:
        """Whether a value is at hand in both parts for nothing: constants, and numbers given."""
        return node.op == "get_attr" or (node.op == "placeholder" and not _tensors(node))

    def behind(self, ends: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
        """All that some nodes are computed from, these included; nothing behind `stop`."""
        halt, found, waiting = set(stop), set[fx.Node](), list(ends)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                if node not in halt:
                    waiting.extend(node.all_input_nodes)
        return found

    def in_order(self, nodes: set[fx.Node]) -> list[fx.Node]:
        return [node for node in self.nodes if node in nodes]


PRIMALS = "primals_"
"""How AOTAutograd begins the names of what a forward graph takes, counted from 1."""


def _least_kept(whole: _Whole) -> list[fx.Node] | None:
    """The values that W begins with, in the order of the graph: the fewest bytes, and of equals what is in memory anyway. None where one
    that cannot be kept stands in every way.
    """
    import networkx  # type: ignore[import-untyped]

    network = networkx.DiGraph()
    source, sink = "source", "sink"
    region = whole.behind(whole.weight_outputs.values())
    for node in whole.in_order(region):
        if whole.is_free(node):
            continue
        network.add_edge((node, "in"), (node, "out"), **_capacity(whole, node))
        reads = [read for read in node.all_input_nodes if not whole.is_free(read)]
        if node in whole.late:
            for read in reads:
                if read not in whole.late:
                    network.add_edge((read, "out"), sink)
        elif node.op == "placeholder" or (node in whole.early and not whole.is_cheap(node)):
            network.add_edge(source, (node, "in"))
        else:
            for read in reads:
                network.add_edge((read, "out"), (node, "in"))
    for node in whole.weight_outputs.values():
        if node not in whole.late and not whole.is_free(node):
            network.add_edge((node, "out"), sink)
    if source not in network or sink not in network:
        return []
    try:
        _, (reached, _) = networkx.minimum_cut(network, source, sink)
    except networkx.NetworkXUnbounded:
        return None
    return [node for node in whole.in_order(region) if (node, "in") in reached and (node, "out") not in reached]


def _capacity(whole: _Whole, node: fx.Node) -> dict[str, int]:
    """What keeping a value costs, as an attribute of an edge; without one it cannot be kept (several values as one)."""
    if node in whole.late or not isinstance(node.meta.get("val"), Tensor | torch.SymInt | torch.SymFloat):
        return {}
    if whole.is_parameter(node):
        return {"capacity": 0}
    if node.op == "placeholder":
        rank = 0
    elif not whole.is_cheap(node):
        rank = 1
    else:
        rank = 3 if whole.is_view(node) else 2
    return {"capacity": 4 * _bytes(node) + rank}


def _part(
    graph: fx.GraphModule, nodes: Sequence[fx.Node], arguments: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """A graph of some nodes of another. arguments: become placeholders, in this order."""
    part = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in arguments:
        name = str(node.target) if node.op == "placeholder" else node.name
        new[node] = part.placeholder(name)
        new[node].meta = dict(node.meta)
    for node in nodes:
        if node not in new:
            new[node] = part.node_copy(node, lambda read: new[read])
    part.output(tuple(new[node] for node in outputs))
    part.lint()
    return fx.GraphModule(graph, part)


def _ordered(number: dict[fx.Node, int], nodes: set[fx.Node]) -> list[fx.Node]:
    return sorted(nodes, key=lambda node: number[node])


def _tensors(node: fx.Node) -> list[Tensor]:
    return list(tensors_in(node.meta.get("val")))


def _bytes(node: fx.Node) -> int:
    return sum(size_hint(tensor.untyped_storage().nbytes()) for tensor in _tensors(node))


def run_in_two(cut: BackwardCut, first: Boxed, second: Boxed, leave: Leave) -> Boxed:
    """The whole of a backward graph that has been cut. first, second: B and W, compiled."""

    def run(arguments: list[Any]) -> list[Any]:
        kept = [arguments[index] for index in cut.weight_arguments]
        given = [arguments[index] for index in cut.input_arguments]
        arguments.clear()
        made = first(given)
        count = len(cut.input_outputs)
        kept += made[count:]
        outputs: list[Any] = [None] * cut.num_outputs
        for position, gradient in zip(cut.input_outputs, made, strict=False):
            outputs[position] = gradient
        del made

        def rest() -> Sequence[Any]:
            return second(kept)

        if not leave(rest, cut.weight_outputs):
            for position, gradient in zip(cut.weight_outputs, rest(), strict=True):
                outputs[position] = gradient
        return outputs

    return run
