"""Proves a program: dependencies, messages, absence of deadlock, every action once. `problems_of` returns all that is wrong with one."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator

from colossal_core.errors import Problem
from colossal_core.program import Action, ActionKind, Program
from colossal_pipeline.schedules.messages import Link, message_before

COMPUTED: frozenset[ActionKind] = frozenset({"forward", "backward", "backward_input", "backward_weight"})
"""What takes a rank's time: `F`, `B`, `I`, `W`."""
GRADIENTS: frozenset[ActionKind] = frozenset({"backward", "backward_weight"})
"""What makes gradients of parameters: `B`, `W`."""
_KINDS = COMPUTED | {"send", "receive", "reduce"}


def problems_of(program: Program) -> list[Problem]:
    """Everything wrong with a program; empty for one that the runner may execute.

    Proven: stage_ranks gives every rank a stage; every action is on the rank of its stage; `F`, and either `B` or both `I` and `W`, run
    once for every stage and microbatch, in this order, after what they need; every tensor that crosses ranks is sent once, after it was
    made, and received once, before it is needed; over each link (ordered pair of ranks, activations and gradients apart) tensors are
    received in the order in which they are sent; every rank comes to its end where sends never wait and receives wait for their tensor;
    every stage is reduced once, after its last backward action.

    Deadlock is looked for only when nothing else is wrong, because any other fault would show as one.
    """
    problems = _placement_problems(program)
    if problems:
        return problems
    problems = _place_problems(program)
    if problems:
        return problems
    problems = [*_count_problems(program), *_order_problems(program)]
    problems += [*_message_problems(program), *_reduce_problems(program)]
    return problems or _deadlock_problems(program)


def compute_problems_of(program: Program) -> list[Problem]:
    """As `problems_of`, for a program to which messages and reductions are still to be added."""
    return (
        _placement_problems(program)
        or _place_problems(program)
        or [*_count_problems(program), *_order_problems(program)]
    )


def peak_activations(program: Program) -> tuple[int, ...]:
    """For each rank, the largest number of stage-microbatch activations that are alive at once.

    One is alive from its `F` until its `B`; where the backward pass is split, until its `W`. `I` frees none: what it leaves for `W`
    counts as a whole activation, which is an upper bound (matrix products keep their inputs until `W`; the rest could go at `I`).
    """
    peaks = []
    for order in program.actions:
        alive = peak = 0
        for action in order:
            alive += (action.kind == "forward") - (action.kind in GRADIENTS)
            peak = max(peak, alive)
        peaks.append(peak)
    return tuple(peaks)


def _placement_problems(program: Program) -> list[Problem]:
    problems = []
    if program.num_microbatches < 1:
        reason, remedy = "a step has at least one microbatch", "give 1 or more"
        problems.append(Problem("schedule.num_microbatches", reason, remedy, program.num_microbatches))
    num_ranks = len(program.actions)
    outside = sorted({rank for rank in program.stage_ranks if not 0 <= rank < num_ranks})
    empty = [rank for rank in range(num_ranks) if rank not in program.stage_ranks]
    if outside or not program.stage_ranks:
        reason = f"every stage is on one of the ranks that have a list of actions, 0 to {num_ranks - 1}"
        remedy = "name these ranks, or give a list of actions for each rank"
        problems.append(Problem("schedule.stage_ranks", reason, remedy, list(program.stage_ranks)))
    elif empty:
        reason = f"every rank holds a stage, and rank {empty[0]} holds none"
        problems.append(
            Problem("schedule.stage_ranks", reason, "give it one, or use fewer ranks", [*program.stage_ranks])
        )
    return problems


def _place_problems(program: Program) -> list[Problem]:
    """Actions that are no part of a pipeline's program, or not of this rank's."""
    problems = []
    for rank, order in enumerate(program.actions):
        for action in order:
            problem = _action_problem(program, rank, action)
            if problem is not None:
                reason, remedy = problem
                problems.append(_problem(rank, action, reason, remedy))
    return problems


def _action_problem(program: Program, rank: int, action: Action) -> tuple[str, str] | None:
    last_stage, last = program.num_stages - 1, program.num_microbatches - 1
    if action.kind not in _KINDS or action.block:
        reason = "a pipeline's program has the actions F, B, I, W, S, V and R of whole stages"
        return reason, "leave it out: parameters are gathered when they are first used, and released when the step ends"
    if not 0 <= action.stage <= last_stage:
        return f"stages are 0 to {last_stage}", "correct the stage, or stage_ranks"
    if program.stage_ranks[action.stage] != rank:
        held_by = program.stage_ranks[action.stage]
        return f"stage {action.stage} is on rank {held_by}", f"move it to the list of rank {held_by}"
    if action.kind == "reduce":
        return None if action.microbatch < 0 else ("a stage is reduced once a step", "write it without a microbatch")
    if not 0 <= action.microbatch <= last:
        return f"microbatches are 0 to {last}", "correct the microbatch, or the number of microbatches"
    if action.kind in COMPUTED:
        return None
    if abs(action.peer_stage - action.stage) != 1 or not 0 <= action.peer_stage <= last_stage:
        return "tensors go between a stage and the next one or the one before", "name such a stage"
    if program.stage_ranks[action.peer_stage] == rank:
        return (
            f"stages {action.stage} and {action.peer_stage} are on one rank, where tensors are handed over",
            "leave it out",
        )
    return None


def _count_problems(program: Program) -> Iterator[Problem]:
    for rank, order in enumerate(program.actions):
        counts = Counter(order)
        for action, count in counts.items():
            if count > 1:
                yield _problem(rank, action, f"it is done {count} times", "do it once")
        for stage in program.stages_of(rank):
            for microbatch in range(program.num_microbatches):
                yield from _missing(rank, stage, microbatch, counts)


def _missing(rank: int, stage: int, microbatch: int, counts: Counter[Action]) -> Iterator[Problem]:
    run = Action("forward", stage, microbatch)
    whole = Action("backward", stage, microbatch)
    parts = Action("backward_input", stage, microbatch), Action("backward_weight", stage, microbatch)
    if not counts[run]:
        yield _problem(rank, run, "every stage runs every microbatch", "add it")
    present = [part for part in parts if counts[part]]
    if counts[whole] and present:
        reason = f"the backward pass is done whole and in parts ({present[0]})"
        yield _problem(rank, whole, reason, f"keep either it or both {parts[0]} and {parts[1]}")
    elif not counts[whole] and not present:
        reason = "every stage runs every microbatch backward"
        yield _problem(rank, whole, reason, f"add it, or both {parts[0]} and {parts[1]}")
    elif not counts[whole] and len(present) == 1:
        lost = parts[1] if present[0] == parts[0] else parts[0]
        yield _problem(rank, lost, f"{present[0]} is only one part of a backward pass", "add it")


def _order_problems(program: Program) -> Iterator[Problem]:
    """On each rank: what an action needs comes before it."""
    for rank, order in enumerate(program.actions):
        place = {action: number for number, action in reversed(list(enumerate(order)))}  # a doubled action counts first
        for action in order:
            for needed in _needed_here(action, program.stage_ranks):
                if needed in place and place[needed] > place[action]:
                    yield _problem(rank, action, f"it needs {needed}, which comes after it", f"put it after {needed}")


def _needed_here(action: Action, stage_ranks: tuple[int, ...]) -> Iterator[Action]:
    """Actions of the same rank that must come before this one, where the program has them."""
    stage, microbatch, here = action.stage, action.microbatch, stage_ranks[action.stage]
    if action.kind == "forward":
        if stage > 0 and stage_ranks[stage - 1] == here:
            yield Action("forward", stage - 1, microbatch)
    elif action.kind in ("backward", "backward_input"):
        yield Action("forward", stage, microbatch)
        if stage + 1 < len(stage_ranks) and stage_ranks[stage + 1] == here:
            yield Action("backward", stage + 1, microbatch)
            yield Action("backward_input", stage + 1, microbatch)
    elif action.kind == "backward_weight":
        yield Action("backward_input", stage, microbatch)
    elif action.kind == "send" and action.carries == "activations":
        yield Action("forward", stage, microbatch)
    elif action.kind == "send":
        yield Action("backward", stage, microbatch)
        yield Action("backward_input", stage, microbatch)
    message = message_before(action, stage_ranks)
    if message is not None:
        yield message[1]


def _message_problems(program: Program) -> Iterator[Problem]:
    expected: dict[Action, Action] = {}
    for order in program.actions:
        for action in order:
            message = message_before(action, program.stage_ranks)
            if message is not None:
                expected[message[0]] = message[1]
    sent: dict[Link, list[Action]] = defaultdict(list)
    received: dict[Link, list[Action]] = defaultdict(list)
    taken_by = {receive: send for send, receive in expected.items()}
    for rank, order in enumerate(program.actions):
        for action in order:
            if action.kind == "send" and action in expected:
                sent[rank, program.stage_ranks[action.peer_stage], action.carries].append(action)
            elif action.kind == "receive" and action in taken_by:
                received[program.stage_ranks[action.peer_stage], rank, action.carries].append(taken_by[action])
            elif action.kind in ("send", "receive"):
                yield _problem(rank, action, "no action needs what it moves", "leave it out")
    yield from _unmatched(program, expected)
    for link, sends in sent.items():
        yield from _queue_problems(link, sends, received[link], expected)


def _unmatched(program: Program, expected: dict[Action, Action]) -> Iterator[Problem]:
    present = {action for order in program.actions for action in order if action.kind in ("send", "receive")}
    for send, receive in expected.items():
        if send not in present:
            rank = program.stage_ranks[send.stage]
            yield _problem(
                rank, send, f"stage {receive.stage} on rank {program.stage_ranks[receive.stage]} needs it", "add it"
            )
        if receive not in present:
            rank = program.stage_ranks[receive.stage]
            yield _problem(rank, receive, f"stage {receive.stage} needs what stage {send.stage} sends", "add it")


def _queue_problems(
    link: Link, sends: list[Action], received: list[Action], expected: dict[Action, Action]
) -> Iterator[Problem]:
    """The first place at which a link's receiver asks for another tensor than the sender sends."""
    if Counter(sends) != Counter(received):
        return  # one is missing or doubled, which is reported as such
    source, target, payload = link
    for sent, asked in zip(sends, received, strict=True):
        if sent != asked:
            reason = f"rank {source} sends {sent} first, and {payload} from it to rank {target} arrive in the order of sending"
            yield _problem(target, expected[asked], reason, f"put it after {expected[sent]}, or send {asked} first")
            return


def _reduce_problems(program: Program) -> Iterator[Problem]:
    for rank, order in enumerate(program.actions):
        for stage in program.stages_of(rank):
            reduce = Action("reduce", stage)
            if reduce not in order:
                yield _problem(rank, reduce, "the gradients of every stage are reduced once a step", "add it")
                continue
            later = [
                action for action in order[order.index(reduce) :] if action.stage == stage and action.kind in GRADIENTS
            ]
            if later:
                yield _problem(rank, reduce, f"it needs {later[-1]}, which comes after it", f"put it after {later[-1]}")


def _deadlock_problems(program: Program) -> list[Problem]:
    """Runs the program without time: sends never wait, a receive waits until its tensor was sent."""
    waiting = [deque(order) for order in program.actions]
    sent: set[tuple[int, int, int]] = set()
    moved = True
    while moved:
        moved = False
        for order in waiting:
            while order:
                action = order[0]
                if action.kind == "receive" and (action.peer_stage, action.stage, action.microbatch) not in sent:
                    break
                if action.kind == "send":
                    sent.add((action.stage, action.peer_stage, action.microbatch))
                order.popleft()
                moved = True
    stuck = {rank: order[0] for rank, order in enumerate(waiting) if order}
    problems = []
    for rank, receive in stuck.items():
        source = program.stage_ranks[receive.peer_stage]
        send = Action("send", receive.peer_stage, receive.microbatch, "", receive.stage)
        reason = f"rank {rank} waits here for {send} of rank {source}, which waits at {stuck[source]}, for ever"
        problems.append(_problem(rank, receive, reason, f"put {send} before {stuck[source]}, or {receive} later"))
    return problems


def _problem(rank: int, action: Action, reason: str, remedy: str) -> Problem:
    return Problem(f"schedule.actions[{rank}]", reason, remedy, str(action))
