"""What generators write: for each rank its compute actions in order, without messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from colossal_core.program import Action

Orders = list[list[Action]]
"""For each rank, what it computes, in order."""


def forward(stage: int, microbatch: int) -> Action:
    """`F`: the forward pass of a microbatch through a stage."""
    return Action("forward", stage, microbatch)


def backward(stage: int, microbatch: int) -> Action:
    """`B`: the whole backward pass of a microbatch through a stage."""
    return Action("backward", stage, microbatch)


def backward_input(stage: int, microbatch: int) -> Action:
    """`I`: the part of a backward pass that the stage before waits for, the gradient of the stage's input."""
    return Action("backward_input", stage, microbatch)


def backward_weight(stage: int, microbatch: int) -> Action:
    """`W`: the rest of a backward pass, the gradients of the stage's parameters. Nothing waits for it but the optimizer."""
    return Action("backward_weight", stage, microbatch)


def loop_ranks(num_ranks: int, num_chunks: int) -> tuple[int, ...]:
    """Stage s on rank s mod p: every chunk runs from the first rank to the last."""
    return tuple(range(num_ranks)) * num_chunks


def v_ranks(num_ranks: int) -> tuple[int, ...]:
    """Two chunks in a V: the first runs from the first rank to the last, the second back. The last stage is on the first rank."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def first_microbatches(orders: Iterable[Sequence[Action]], num_microbatches: int) -> Orders:
    """The same orders with later microbatches left out.

    How a schedule that is defined for certain numbers of microbatches serves every other. Nothing depends on another microbatch, so that
    what is left of an order without a cycle has none; no rank waits longer, and none holds more.
    """
    return [[action for action in order if action.microbatch < num_microbatches] for order in orders]


class InTurn:
    """Writes the order of one rank in which forward and backward passes of each stage take the microbatches in turn: 0, 1, 2, ..."""

    def __init__(self, stages: tuple[int, ...]) -> None:
        """stages: the rank's, chunk 0 first."""
        self.order: list[Action] = []
        self._stages = stages
        self._next: Counter[tuple[str, int]] = Counter()
        self._weights: list[Action] = []

    def add(self, pattern: str, times: int = 1) -> None:
        """Adds `pattern` that many times: letters and chunks, such as `F0 I1 W1`.

        `B` and `I` are the backward pass of the stage's next microbatch, whole or its input part. `W1` is the weight part that has waited
        longest in chunk 1, `W` the one that has in any chunk.
        """
        for _ in range(times):
            for name in pattern.split():
                self.order.append(self._weight(name[1:]) if name[0] == "W" else self._pass(name[0], int(name[1:])))

    def _pass(self, letter: str, chunk: int) -> Action:
        counted = ("F" if letter == "F" else "B", chunk)
        stage, microbatch = self._stages[chunk], self._next[counted]
        self._next[counted] += 1
        if letter == "I":
            self._weights.append(backward_weight(stage, microbatch))
            return backward_input(stage, microbatch)
        return forward(stage, microbatch) if letter == "F" else backward(stage, microbatch)

    def _weight(self, chunk: str) -> Action:
        stage = self._stages[int(chunk)] if chunk else None
        taken = next(action for action in self._weights if stage in (None, action.stage))
        self._weights.remove(taken)
        return taken
