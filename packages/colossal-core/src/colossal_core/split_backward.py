"""A backward pass cut in two: gradients of the inputs now, those of the parameters later, for any graph that autograd can make.

Every node of the graph leads to an input, to a parameter, to both, or to neither. The input part runs the nodes that lead to an input, and
catches the gradient that arrives at each node of these which also has a way to parameters alone (a matrix product: one way to its
input, one to its weight). The weight part runs those nodes once more, for that way only, and then what lies behind it.
Qi et al. 2023, "Zero Bubble Pipeline Parallelism", name the two parts B and W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from colossal_core._torch_private import call_node, num_gradients_in

Gradients = tuple[Tensor | None, ...]
Edge = tuple[Node, int]


@dataclass(frozen=True)
class _Fork:
    """A node that leads to inputs one way and to parameters alone another. incoming: the edges through which gradients arrive at it;
    ways: (position among its results, edge) of the ways to parameters alone; tangled: another way out of it meets one of those again.
    """

    node: Node
    incoming: tuple[Edge, ...]
    ways: tuple[tuple[int, Edge], ...]
    tangled: bool


class SplitBackward:
    """The backward pass of one graph. outputs: with a graph, each of which gets a gradient. inputs, parameters: leaves."""

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        self._inputs = tuple(inputs)
        self._parameters = tuple(parameters)
        self._graph = _Graph([_edge(output) for output in outputs])
        to_inputs = self._graph.leading_to([_edge(tensor)[0] for tensor in inputs])
        to_parameters = self._graph.leading_to([_edge(parameter)[0] for parameter in parameters])
        self._weights_only = to_parameters - to_inputs
        self._forks = self._graph.forks(to_inputs, self._weights_only)
        self._arrived: list[Gradients] = []
        self._collected: dict[Edge, Tensor] = {}

    def input_gradients(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Gradients:
        """The gradient of each input, None where no output depends on it. Keeps the graph."""
        for output, gradient in zip(outputs, gradients, strict=True):
            if _edge(output)[0] in self._weights_only:
                self._collect(_edge(output), gradient)
        incoming = [GradientEdge(*edge) for fork in self._forks for edge in fork.incoming]
        targets: list[Any] = [*self._inputs, *incoming]  # torch takes both together, its types only one of them
        if not targets or not outputs:
            return (None,) * len(self._inputs)
        found = torch.autograd.grad(outputs, targets, gradients, retain_graph=True, allow_unused=True)
        rest = iter(found[len(self._inputs) :])
        self._arrived = [tuple(next(rest) for _ in fork.incoming) for fork in self._forks]
        return found[: len(self._inputs)]

    def parameter_gradients(self) -> Gradients:
        """The gradient of each parameter, None where no output depends on it. Once, after `input_gradients`; frees the graph."""
        for fork, gradients in zip(self._forks, self._arrived, strict=True):
            for (_, edge), gradient in zip(fork.ways, _through(fork, gradients), strict=True):
                if gradient is not None:
                    self._collect(edge, gradient)
        leaves = {_edge(parameter)[0]: parameter for parameter in self._parameters}
        direct = {edge[0]: self._collected.pop(edge) for edge in list(self._collected) if edge[0] in leaves}
        behind: Gradients = (None,) * len(self._parameters)
        if self._collected:
            roots = [GradientEdge(*edge) for edge in self._collected]
            behind = torch.autograd.grad(roots, self._parameters, tuple(self._collected.values()), allow_unused=True)
        self._forks, self._collected = (), {}
        return tuple(_sum(direct.get(node), found) for node, found in zip(leaves, behind, strict=True))

    def _collect(self, edge: Edge, gradient: Tensor) -> None:
        self._collected[edge] = self._collected[edge] + gradient if edge in self._collected else gradient


class _Graph:
    """The graph behind some edges. nodes: in a fixed order, roots first."""

    def __init__(self, roots: Sequence[Edge]) -> None:
        self._roots = tuple(roots)
        self.nodes = _reachable([node for node, _ in roots])
        self._parents: dict[Node, list[Node]] = {}
        self._incoming: dict[Node, dict[Edge, None]] = {}
        for node, output in roots:
            self._incoming.setdefault(node, {})[(node, output)] = None
        for node in self.nodes:
            for child, output in _children(node):
                self._parents.setdefault(child, []).append(node)
                self._incoming.setdefault(child, {})[(child, output)] = None

    def leading_to(self, targets: Sequence[Node]) -> set[Node]:
        """Every node with a way to one of `targets`, these included."""
        found: set[Node] = set()
        waiting = [target for target in targets if target in self._incoming]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting.extend(self._parents.get(node, []))
        return found

    def forks(self, to_inputs: set[Node], weights_only: set[Node]) -> tuple[_Fork, ...]:
        forks = []
        for node in self.nodes:
            ways = tuple(
                (position, (child, output))
                for position, (child, output) in enumerate(node.next_functions)
                if child is not None and child in weights_only
            )
            if node in to_inputs and ways:
                others = _reachable([child for child, _ in _children(node) if child not in weights_only])
                again = {edge for other in others for edge in _children(other)}
                repeated = len({edge for _, edge in ways}) < len(ways)
                tangled = repeated or any(edge in again for _, edge in ways)
                forks.append(_Fork(node, tuple(self._incoming[node]), ways, tangled))
        return tuple(forks)


def _through(fork: _Fork, gradients: Gradients) -> Gradients:
    """The gradients that leave a fork by each of its ways, given those that arrived.

    A tangled fork is called by itself, which costs its input gradients once more: asked by its edges, autograd would also follow the
    other way round and count that part of the gradient twice (a weight that the same block uses again further down).
    """
    reached = [
        (edge, gradient) for edge, gradient in zip(fork.incoming, gradients, strict=True) if gradient is not None
    ]
    if not reached:
        return (None,) * len(fork.ways)
    if fork.tangled:
        arguments: list[Tensor | None] = [None] * num_gradients_in(fork.node)
        for (_, output), gradient in reached:
            arguments[output] = gradient
        results = call_node(fork.node, arguments)
        return tuple(results[position] for position, _ in fork.ways)
    roots = [GradientEdge(*edge) for edge, _ in reached]
    ways = [GradientEdge(*edge) for _, edge in fork.ways]
    return torch.autograd.grad(roots, ways, [gradient for _, gradient in reached], retain_graph=True, allow_unused=True)


def _edge(tensor: Tensor) -> Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _children(node: Node) -> list[Edge]:
    return [(child, output) for child, output in node.next_functions if child is not None]


def _reachable(roots: Sequence[Node]) -> dict[Node, None]:
    """Every node that the roots lead to, in depth-first order."""
    found: dict[Node, None] = {}
    waiting = list(reversed(roots))
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting.extend(child for child, _ in reversed(_children(node)))
    return found


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
