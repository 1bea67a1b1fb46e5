"""A backward pass cut in two: gradients of the inputs now, those of the parameters later, for any graph that autograd can make.

Every node of the graph leads to an input, to a parameter, to both, or to neither. The input part runs the nodes that lead to an input, and
catches the gradient that arrives at each node of these which also has a way to parameters alone (a matrix product: one way to its
input, one to its weight). The weight part runs those nodes once more, for that way only, and then what lies behind it.
A compiled graph is one such node, which is not run twice: compiled for it (`split_compiled.py`), it leaves its weight part to be called
later; else the gradients that it passes on to parameters wait. Where no other node forks, the graph is freed by the input part.
Qi et al. 2023, "Zero Bubble Pipeline Parallelism", name the two parts B and W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from colossal_core._torch_private import call_node, is_compiled, num_gradients_in

Gradients = tuple[Tensor | None, ...]
Edge = tuple[Node, int]
Root = Tensor | GradientEdge


@dataclass(frozen=True)
class _Fork:
    """A node that leads to inputs one way and to parameters alone another. incoming: the edges through which gradients arrive at it;
    ways: (position among its results, edge) of the ways to parameters alone; tangled: another way out of it meets one of those again.
    """

    node: Node
    incoming: tuple[Edge, ...]
    ways: tuple[tuple[int, Edge], ...]
    tangled: bool


@dataclass
class _Left:
    """What a compiled node that forks leaves to the weight part. ways: by position among its results, its ways to parameters alone;
    results: how many it has; rest: makes the gradients for the ways `rest_ways`; passed: gradients that it has made at once.
    """

    ways: dict[int, Edge]
    results: int
    rest: Callable[[], Sequence[Any]] | None = None
    rest_ways: tuple[int, ...] = ()
    passed: list[tuple[Edge, Tensor]] = field(default_factory=list)

    def keep(self, gradients: Sequence[Tensor | None]) -> None:
        """Called by autograd with all results of the node."""
        found = ((edge, gradients[position]) for position, edge in self.ways.items())
        self.passed = [(edge, gradient) for edge, gradient in found if gradient is not None]

    def gradients(self) -> list[tuple[Edge, Tensor]]:
        """Of all ways, once."""
        found, self.passed = self.passed, []
        if self.rest is not None:
            with torch.no_grad():
                made = self.rest()
            found += [(self.ways[way], one) for way, one in zip(self.rest_ways, made, strict=True) if one is not None]
            self.rest = None
        return found


_LEFT = "colossal_core.split_backward"
"""Under this name a node that is to leave its weight part holds the `_Left` for it."""


def left_to(node: Node, rest: Callable[[], Sequence[Any]], ways: tuple[int, ...], results: int) -> bool:
    """For the backward function of a compiled node: whether `rest` will be called later, for the gradients of these results of `results`.
    False: nobody waits for it, or they do not lead to parameters alone.
    """
    left = _notes(node).get(_LEFT)
    if not isinstance(left, _Left) or left.results != results or not left.ways.keys() >= set(ways):
        return False
    left.rest, left.rest_ways = rest, ways
    return True


class SplitBackward:
    """The backward pass of one graph. outputs: with a graph, each of which gets a gradient, or the edges behind them. inputs, parameters:
    leaves.
    """

    def __init__(self, outputs: Sequence[Root], inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        self._inputs = tuple(inputs)
        self._parameters = tuple(parameters)
        roots = [_root(output) for output in outputs]
        graph = _Graph([(root.node, root.output_nr) for root in roots])
        self._owners: tuple[object, ...] = (
            *roots,
            *graph.nodes,
        )  # to hold a node that is written in Python does not keep it
        to_inputs = graph.leading_to([_edge(tensor)[0] for tensor in inputs])
        to_parameters = graph.leading_to([_edge(parameter)[0] for parameter in parameters])
        self._weights_only = to_parameters - to_inputs
        forks = graph.forks(to_inputs, self._weights_only)
        self._forks = tuple(fork for fork in forks if not is_compiled(fork.node))
        self._compiled = tuple(fork for fork in forks if is_compiled(fork.node))
        self._left: list[_Left] = []
        self._arrived: list[Gradients] = []
        self._collected: dict[Edge, Tensor] = {}

    def input_gradients(self, outputs: Sequence[Root], gradients: Sequence[Tensor]) -> Gradients:
        """The gradient of each input, None where no output depends on it. Keeps what is left of the graph."""
        inputs, self._inputs = self._inputs, ()
        for output, gradient in zip(outputs, gradients, strict=True):
            if _edge(output)[0] in self._weights_only:
                self._collect(_edge(output), gradient)
        incoming = [GradientEdge(*edge) for fork in self._forks for edge in fork.incoming]
        targets: list[Any] = [*inputs, *incoming]  # torch takes both together, its types only one of them
        roots: list[Any] = [*outputs]
        if not targets or not outputs:
            return (None,) * len(inputs)
        hooks = [self._leave(fork) for fork in self._compiled]
        try:
            found = torch.autograd.grad(roots, targets, gradients, retain_graph=bool(self._forks), allow_unused=True)
        finally:
            for fork, hook in zip(self._compiled, hooks, strict=True):
                hook.remove()
                del _notes(fork.node)[_LEFT]
        self._compiled = ()
        if not self._forks and self._weights_only <= {_edge(parameter)[0] for parameter in self._parameters}:
            self._owners = ()
        rest = iter(found[len(inputs) :])
        self._arrived = [tuple(next(rest) for _ in fork.incoming) for fork in self._forks]
        return found[: len(inputs)]

    def parameter_gradients(self) -> Gradients:
        """The gradient of each parameter, None where no output depends on it. Once, after `input_gradients`; frees the graph."""
        for left in self._left:
            for edge, gradient in left.gradients():
                self._collect(edge, gradient)
        for fork, gradients in zip(self._forks, self._arrived, strict=True):
            for (_, edge), arrived in zip(fork.ways, _through(fork, gradients), strict=True):
                if arrived is not None:
                    self._collect(edge, arrived)
        leaves = {_edge(parameter)[0]: parameter for parameter in self._parameters}
        direct = {edge[0]: self._collected.pop(edge) for edge in list(self._collected) if edge[0] in leaves}
        behind: Gradients = (None,) * len(self._parameters)
        if self._collected:
            roots = [GradientEdge(*edge) for edge in self._collected]
            behind = torch.autograd.grad(roots, self._parameters, tuple(self._collected.values()), allow_unused=True)
        self._forks, self._left, self._collected, self._owners = (), [], {}, ()
        return tuple(_sum(direct.get(node), found) for node, found in zip(leaves, behind, strict=True))

    def _leave(self, fork: _Fork) -> RemovableHandle:
        left = _Left(dict(fork.ways), len(fork.node.next_functions))
        self._left.append(left)
        _notes(fork.node)[_LEFT] = left
        return fork.node.register_hook(lambda results, _: left.keep(results))

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


def _notes(node: Node) -> dict[str, object]:
    """What anyone has written down at a node, by name."""
    notes: Any = node.metadata  # a property, which torch types as a method
    found: dict[str, object] = notes
    return found


def _root(root: Root) -> GradientEdge:
    return get_gradient_edge(root) if isinstance(root, Tensor) else root


def _edge(root: Root) -> Edge:
    edge = _root(root)
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
