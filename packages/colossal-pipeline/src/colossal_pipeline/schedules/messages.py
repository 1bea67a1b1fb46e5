"""From the order of computing to a whole program: sends, receives and reductions are added, received in the order of sending."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from colossal_core.program import Action, ActionKind, Program

Link = tuple[int, int, str]
"""Sending rank, receiving rank, and what is carried. Messages over one link arrive in the order in which they were sent."""

Message = tuple[Action, Action]
"""A send, and the receive that takes it."""


def program_of(num_microbatches: int, stage_ranks: tuple[int, ...], orders: Sequence[Sequence[Action]]) -> Program:
    """The program that computes in the given orders (`F`, `B`, `I`, `W` for each rank).

    A send directly follows the action that makes its tensors and never waits. A receive directly precedes the action that needs its
    tensors, except that what the sender sends before it over the same link is received before it. Whoever waits for a message waits for
    all that were sent before it anyway, so that this adds no deadlock. Every list ends with the reductions of its stages, in the order in
    which they are complete.
    """
    sent: dict[Link, list[Message]] = defaultdict(list)
    for order in orders:
        for action in order:
            for message in _sent_by(action, stage_ranks):
                sent[_link(message, stage_ranks)].append(message)
    senders = {link: iter(messages) for link, messages in sent.items()}
    actions = tuple(_list_of(order, stage_ranks, senders) for order in orders)
    return Program(num_microbatches, actions, stage_ranks)


def message_before(action: Action, stage_ranks: tuple[int, ...]) -> Message | None:
    """The message that a compute action needs from another rank, if it needs one."""
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "forward":
        source = stage - 1
    elif action.kind in ("backward", "backward_input"):
        source = stage + 1
    else:
        return None
    if not 0 <= source < len(stage_ranks) or stage_ranks[source] == stage_ranks[stage]:
        return None
    return Action("send", source, microbatch, "", stage), Action("receive", stage, microbatch, "", source)


def _sent_by(action: Action, stage_ranks: tuple[int, ...]) -> Iterator[Message]:
    """The message that follows a compute action, if one does."""
    kind: ActionKind = "forward" if action.kind == "forward" else "backward"
    if action.kind != "backward_weight":
        reader = action.stage + (1 if action.kind == "forward" else -1)
        if 0 <= reader < len(stage_ranks):
            message = message_before(Action(kind, reader, action.microbatch), stage_ranks)
            if message is not None:
                yield message


def _link(message: Message, stage_ranks: tuple[int, ...]) -> Link:
    send, receive = message
    return stage_ranks[send.stage], stage_ranks[receive.stage], send.carries


def _list_of(
    order: Sequence[Action], stage_ranks: tuple[int, ...], senders: dict[Link, Iterator[Message]]
) -> tuple[Action, ...]:
    actions: list[Action] = []
    received: set[Action] = set()
    for action in order:
        needed = message_before(action, stage_ranks)
        if needed is not None and needed[1] not in received:
            for _, receive in senders.get(_link(needed, stage_ranks), iter(())):
                actions.append(receive)
                received.add(receive)
                if receive == needed[1]:
                    break
        actions.append(action)
        actions += [send for send, _ in _sent_by(action, stage_ranks)]
    last = {action.stage: place for place, action in enumerate(order)}
    return (*actions, *(Action("reduce", stage) for stage in sorted(last, key=lambda stage: last[stage])))
