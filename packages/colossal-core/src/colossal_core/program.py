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
    the whole stage. `send` and `receive` also name the stage of the other side: the next one for activations, the one before for their
    gradients.
    """

    kind: ActionKind
    stage: int = 0
    microbatch: int = -1
    block: str = ""
    peer_stage: int = -1

    def __str__(self) -> str:
        """`F2.5`: the forward pass of microbatch 5 through stage 2. `S2>3.5` sends what it made on, `V2<3.5` receives the gradient."""
        where = f"{self.stage}" if not self.block else f"{self.stage}/{self.block}"
        which = "" if self.microbatch < 0 else f".{self.microbatch}"
        other = "" if self.peer_stage < 0 else f"{'>' if self.kind == 'send' else '<'}{self.peer_stage}"
        return f"{LETTERS[self.kind]}{where}{other}{which}"

    @property
    def carries(self) -> Literal["activations", "gradients"]:
        """What a send or a receive moves: activations go to the next stage, gradients to the one before."""
        assert self.kind in ("send", "receive") and abs(self.peer_stage - self.stage) == 1, f"{self} moves nothing"
        to_next = self.peer_stage > self.stage
        return "activations" if to_next == (self.kind == "send") else "gradients"


LETTERS: dict[ActionKind, str] = {
    "forward": "F", "backward": "B", "backward_input": "I", "backward_weight": "W",
    "gather": "G", "release": "L", "reduce": "R", "send": "S", "receive": "V",
}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """The step of every pipeline rank.

    num_microbatches: of a step. actions: `actions[p]` is the list of pp coordinate p. stage_ranks: for each stage the pp coordinate that
    holds it; between two stages of one coordinate nothing is sent, the tensors are handed over.
    """

    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]
    stage_ranks: tuple[int, ...] = (0,)

    @property
    def num_stages(self) -> int:
        return len(self.stage_ranks)

    def stages_of(self, coordinate: int) -> tuple[int, ...]:
        """The stages that a pp coordinate holds, in the order of the model."""
        return tuple(stage for stage, rank in enumerate(self.stage_ranks) if rank == coordinate)


Part = Literal["forward", "backward", "backward_input", "backward_weight"]
WHOLE: frozenset[Part] = frozenset({"forward", "backward"})
SPLIT: frozenset[Part] = WHOLE | {"backward_input", "backward_weight"}
"""The parts that a block may run in: what is compiled is one node of autograd's graph, and has no split parts."""


def missing_parts(program: Program, parts: frozenset[Part]) -> tuple[str, ...]:
    """The parts that a program asks of a runner of blocks that has only `parts`, in the order of the program."""
    asked = (action.kind for actions in program.actions for action in actions)
    return tuple(dict.fromkeys(kind for kind in asked if kind in SPLIT and kind not in parts))


def plain_program(num_microbatches: int) -> Program:
    """The program without a pipeline: `F0 B0 F1 B1 ...`, then one reduce action that closes what the backward hooks left open."""
    actions: list[Action] = []
    for microbatch in range(num_microbatches):
        actions += [Action("forward", 0, microbatch), Action("backward", 0, microbatch)]
    actions.append(Action("reduce", 0))
    return Program(num_microbatches, (tuple(actions),))


def forward_actions(program: Program, coordinate: int, num_microbatches: int) -> tuple[Action, ...]:
    """The forward passes of one pp coordinate in an evaluation: stage by stage, each with all microbatches."""
    ranks, last = program.stage_ranks, program.num_stages - 1
    actions: list[Action] = []
    for stage in program.stages_of(coordinate):
        for microbatch in range(num_microbatches):
            if stage > 0 and ranks[stage - 1] != coordinate:
                actions.append(Action("receive", stage, microbatch, peer_stage=stage - 1))
            actions.append(Action("forward", stage, microbatch))
            if stage < last and ranks[stage + 1] != coordinate:
                actions.append(Action("send", stage, microbatch, peer_stage=stage + 1))
    return tuple(actions)
