"""What a rank that fails leaves behind for its launcher, and how the launcher tells which rank was the first."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from colossal_core.errors import ColossalError, CommunicationError

RECORD_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""Set by torch's elastic agents, ours and torchrun's."""
_OWN_KEY = "colossal"


class WorkerError(ColossalError):
    """A rank failed. The message tells of the first one; the others are folded into one line.

    rank_traceback: that of the first; empty where it left none. known: whether the message says all that there is to know.
    """

    def __init__(self, message: str, rank_traceback: str, *, known: bool) -> None:
        super().__init__(message)
        self.rank_traceback = rank_traceback
        self.known = known


@dataclass(frozen=True)
class FailureRecord:
    """An exception that ended a rank. seconds: when, on the clock of the host. known: an error whose message says what to do.

    communication: the rank failed because another one was gone, or did not come.
    """

    message: str
    where: str
    traceback: str
    seconds: float
    known: bool
    communication: bool


@dataclass(frozen=True)
class FailedRank:
    """A rank that ended with an exit status other than 0 (negative: a signal)."""

    rank: int
    pid: int
    status: int
    record: FailureRecord | None = None


def recorded(action: Callable[[], int], *, aloud: bool) -> int:
    """Runs one rank. An exception becomes a record for the launcher and exit status 1; Ctrl-C ends it quietly with 130.

    aloud: the launcher is not ours, so this rank prints its own message, and its traceback where the error is not a known one.
    """
    try:
        return action()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        record = _record_of(error)
        write_record(record)
        if aloud:
            print_failure(record)
        return 1


def print_failure(record: FailureRecord) -> None:
    """One rank's message on standard error, or its traceback where the message alone would not help."""
    rank = os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("SLURM_PROCID", "?")))
    text = record.message if record.known else record.traceback.rstrip()
    sys.stderr.write(f"error on rank {rank}: {text}\n")


def _record_of(error: Exception) -> FailureRecord:
    known = isinstance(error, ColossalError)
    return FailureRecord(
        message=str(error) if known else described(error),
        where=location(error),
        traceback="".join(traceback.format_exception(error)),
        seconds=time.time(),
        known=known,
        communication=isinstance(error, CommunicationError) or _from_torch_distributed(error),
    )


def described(error: BaseException) -> str:
    """Type and message of an error that nobody expected, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def location(error: BaseException) -> str:
    """`file.py, line 12` of the statement that raised it; empty where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""


def _from_torch_distributed(error: Exception) -> bool:
    names = {parent.__name__ for parent in type(error).__mro__}
    return "DistError" in names or "gloo/transport" in str(error)


def write_record(record: FailureRecord) -> None:
    """Writes the record where the elastic agent that started this rank looks for it, in its format, with our own part beside it."""
    path = os.environ.get(RECORD_VARIABLE)
    if not path:
        return
    details = {"py_callstack": record.traceback, "timestamp": str(int(record.seconds))}
    data = {"message": {"message": record.message, "extraInfo": details}, _OWN_KEY: asdict(record)}
    Path(path).write_text(json.dumps(data), encoding="utf-8")


def parse_record(data: object) -> FailureRecord | None:
    """The record in what an agent read; None where the rank left none of ours."""
    own = data.get(_OWN_KEY) if isinstance(data, Mapping) else None
    return FailureRecord(**own) if isinstance(own, Mapping) else None


def worker_error(failed: Iterable[FailedRank]) -> WorkerError:
    """What the user reads: the first failure in full, the others in one line."""
    ordered = sorted(failed, key=_precedence)
    first, others = ordered[0], sorted(other.rank for other in ordered[1:])
    record = first.record
    if record is not None and record.known:
        return WorkerError(record.message, record.traceback, known=True)
    lines = [_headline(first)]
    if others:
        lines.append(f"rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))} failed after it")
    rank_traceback = record.traceback if record is not None else ""
    return WorkerError("\n".join(lines), rank_traceback, known=not rank_traceback)


def _precedence(failed: FailedRank) -> tuple[int, float, int]:
    """Errors of a rank's own by time, then deaths without a word, then those who missed another rank."""
    if failed.record is None:
        return (1, 0.0 if failed.status < 0 else 1.0, failed.rank)
    return (2 if failed.record.communication else 0, failed.record.seconds, failed.rank)


def _headline(failed: FailedRank) -> str:
    record = failed.record
    if record is None and failed.status < 0:
        number = -failed.status
        hint = ": the system may have been out of memory" if number == signal.SIGKILL else ""
        return f"rank {failed.rank} (pid {failed.pid}) died of signal {number} ({_signal_name(number)}){hint}"
    if record is None:
        return f"rank {failed.rank} (pid {failed.pid}) ended with exit status {failed.status}"
    where = f" ({record.where})" if record.where else ""
    return f"rank {failed.rank} (pid {failed.pid}) failed first: {record.message}{where}"


def _signal_name(number: int) -> str:
    return next((found.name for found in signal.Signals if found == number), "unknown")
