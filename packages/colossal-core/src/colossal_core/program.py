"""A training step as data: for each rank, an ordered list of actions. A pipeline contributes other programs, never another loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ActionKind = Literal[
    "forward", "backward", "backward_input", "backward_weight", "gather", "release", "reduce", "send", "receive"
]


@dataclass(frozen=True)
class Action:
    """One thing that a rank does. stage: the model stage; microbatch: -1 for what is done once a step; block: name of a block, or "" for
    the whole stage (an expansion to blocks is core's, by the plan's policy). `send` and `receive` also name the stage of the other side.
    """

    kind: ActionKind
    stage: int = 0
    microbatch: int = -1
    block: str = ""
    peer_stage: int = -1

    def __str__(self) -> str:
        letters = {
            "forward": "F", "backward": "B", "backward_input": "I", "backward_weight": "W",
            "gather": "G", "release": "L", "reduce": "R", "send": "S", "receive": "V",
        }  # fmt: skip
        where = f"{self.stage}" if not self.block else f"{self.stage}/{self.block}"
        which = "" if self.microbatch < 0 else f".{self.microbatch}"
        return f"{letters[self.kind]}{where}{which}"


@dataclass(frozen=True)
class Program:
    """The step of every pipeline rank. num_microbatches and num_stages bound the actions; `actions[p]` is the list of pp coordinate p."""

    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]
    num_stages: int = 1


PLAIN_KINDS: frozenset[ActionKind] = frozenset({"forward", "backward", "reduce"})
"""What core's own runner can do. A program with another kind needs a runner that a pipeline brings."""


def plain_program(num_microbatches: int) -> Program:
    """The program without a pipeline: `F0 B0 F1 B1 ...`, then one reduce action that closes what the backward hooks left open."""
    actions: list[Action] = []
    for microbatch in range(num_microbatches):
        actions += [Action("forward", 0, microbatch), Action("backward", 0, microbatch)]
    actions.append(Action("reduce", 0))
    return Program(num_microbatches, (tuple(actions),))
