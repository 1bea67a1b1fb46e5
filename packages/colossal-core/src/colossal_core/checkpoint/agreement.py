"""All ranks succeed, or all raise the same error: no rank is left waiting in a collective for one that has failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from colossal_core.errors import CheckpointError
from colossal_core.mesh import WORLD

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

_T = TypeVar("_T")
_MAX_REPORTED = 8


def all_or_none(
    collectives: Collectives, failure: str, work: Callable[[], tuple[_T, Any]], *, consequence: str = ""
) -> tuple[_T, list[Any]]:
    """Runs `work` here and waits for every rank's.

    work: returns what stays on this rank and a JSON value for the others. failure, consequence: how the error begins and ends.
    Returns this rank's own result and every rank's JSON value, in rank order.
    Communicates one gather of bytes over all ranks: the JSON of the value, or the error's text.
    Errors: CheckpointError, with one and the same message on every rank, naming the ranks that failed.
    """
    own: tuple[_T, Any] | None = None
    cause: Exception | None = None
    try:
        own = work()
        outcome = json.dumps({"result": own[1]}, separators=(",", ":"))
    except Exception as error:  # whatever it is: the other ranks are waiting to be told
        cause = error
        outcome = json.dumps({"error": _text(error)})
    gathered = collectives.gather_bytes(outcome.encode(), WORLD, tag="checkpoint")
    outcomes = [json.loads(data) for data in gathered]
    failed = [(rank, item["error"]) for rank, item in enumerate(outcomes) if "error" in item]
    if failed:
        raise CheckpointError(f"{failure}: {_list_failures(failed, len(outcomes))}{consequence}") from cause
    assert own is not None
    return own[0], [item["result"] for item in outcomes]


def _text(error: Exception) -> str:
    if isinstance(error, CheckpointError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _list_failures(failed: list[tuple[int, str]], world_size: int) -> str:
    texts = list(dict.fromkeys(text for _, text in failed))
    if len(texts) == 1 and len(failed) == world_size:
        return texts[0]
    lines = [f"rank {rank}: {text}" for rank, text in failed[:_MAX_REPORTED]]
    if len(failed) > _MAX_REPORTED:
        lines.append(f"and {len(failed) - _MAX_REPORTED} more ranks")
    return "; ".join(lines)
