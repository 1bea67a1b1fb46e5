"""Which rank is told of, and how, when several have failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colossal_core.errors import CommunicationError, ConfigError, Problem
from colossal_launch.run.agent import _outcome
from colossal_launch.run.failure import (
    FailedRank,
    FailureRecord,
    WorkerError,
    parse_record,
    recorded,
    worker_error,
)


def record(message: str, seconds: float, *, known: bool = False, communication: bool = False) -> FailureRecord:
    return FailureRecord(message, "train.py, line 3", f"Traceback of {message}\n", seconds, known, communication)


def test_the_first_error_of_its_own_is_told_before_deaths_and_before_those_who_missed_a_rank() -> None:
    missed = FailedRank(0, 10, 1, record("Connection closed", 1.0, communication=True))
    killed = FailedRank(1, 11, -9)
    late = FailedRank(2, 12, 1, record("KeyError: 'b'", 5.5))
    early = FailedRank(3, 13, 1, record("KeyError: 'a'", 5.2))
    error = worker_error([missed, killed, late, early])
    assert str(error) == (
        "rank 3 (pid 13) failed first: KeyError: 'a' (train.py, line 3)\nranks 0, 1, 2 failed after it"
    )
    assert (error.rank_traceback, error.known) == ("Traceback of KeyError: 'a'\n", False)
    error = worker_error([missed, killed])
    assert str(error) == (
        "rank 1 (pid 11) died of signal 9 (SIGKILL): the system may have been out of memory\nrank 0 failed after it"
    )
    assert (error.rank_traceback, error.known) == ("", True)
    assert str(worker_error([FailedRank(1, 11, -11)])) == "rank 1 (pid 11) died of signal 11 (SIGSEGV)"
    assert str(worker_error([FailedRank(1, 11, 7)])) == "rank 1 (pid 11) ended with exit status 7"


def test_an_error_that_says_what_to_do_is_told_alone() -> None:
    error = worker_error(
        [FailedRank(rank, 10 + rank, 1, record("disk full", 1.0 + rank, known=True)) for rank in (0, 1)]
    )
    assert (str(error), error.known) == ("disk full", True)


def test_a_record_is_what_torch_reads_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))

    def fail() -> int:
        raise CommunicationError("rank 1 did not come")

    assert recorded(fail, aloud=False) == 1
    data = json.loads(path.read_text())
    found = parse_record(data)
    assert found is not None
    assert (found.message, found.known, found.communication) == ("rank 1 did not come", True, True)
    assert data["message"]["message"] == "rank 1 did not come"
    assert data["message"]["extraInfo"]["py_callstack"] == found.traceback
    assert parse_record({"message": "of another program"}) is None


def test_a_rank_of_another_launcher_tells_its_own_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("RANK", "3")

    def refuse() -> int:
        raise ConfigError([Problem("batch", "is odd", "make it even", 3)])

    def fail() -> int:
        raise KeyError("x")

    def leave() -> int:
        raise KeyboardInterrupt

    assert recorded(refuse, aloud=True) == 1
    assert capsys.readouterr().err == "error on rank 3: batch=3: is odd: make it even\n"
    assert recorded(fail, aloud=True) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error on rank 3: Traceback (most recent call last):"
    assert lines[-1] == "KeyError: 'x'"
    assert recorded(leave, aloud=True) == 130


def test_the_exit_status_after_a_signal() -> None:
    """2 is SIGINT. A rank that was still starting dies of it, and then the others miss it."""
    missed = {0: record("Connection closed", 1.0, communication=True)}
    assert _outcome(2, {0: 130, 1: 130}, {}, {}) == 130
    assert _outcome(2, {0: 1, 1: -2}, {}, missed) == 130
    assert _outcome(15, {}, {}, {}) == 143
    assert _outcome(None, {0: 143, 1: 143}, {}, {}) == 143
    assert _outcome(None, {}, {}, {}) == 0
    with pytest.raises(WorkerError, match=r"^no space left$"):
        _outcome(2, {0: 1, 1: 1}, {}, {0: record("no space left", 1.0, known=True)})
