"""What the user reads when something is wrong: one typed exception per kind, and `Problem`, the unit of every report.

A problem names the dotted field, the value, the reason and the remedy. Problems are collected and reported together; nothing is
raised at the first one. `exit_status` is what the `colossal` command returns: 2 for whatever can be found before the first worker
starts, 1 for a run that failed after.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class _Unset(enum.Enum):
    """Stands for no value. An enum, because its member is the same object after it was pickled on the way from another process."""

    UNSET = "unset"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong and what to do about it.

    field: dotted path in the config (`parallel.zero.stage`), or what else can be changed by the user (`--processes`, `checkpoint`).
    reason: what is allowed and why this is not. remedy: what to do, as an instruction. value: what was given; left out when absent.
    """

    field: str
    reason: str
    remedy: str
    value: object = _Unset.UNSET  # so that None can be a value

    def __str__(self) -> str:
        given = "" if self.value is _Unset.UNSET else f"={self.value!r}"
        return f"{self.field}{given}: {self.reason}: {self.remedy}"


class ColossalError(Exception):
    """Any error that the user can act on. An `AssertionError` in this code base is our own mistake instead."""

    exit_status: int = 1


class ConfigError(ColossalError):
    """Everything wrong with what was asked for, found before any worker starts."""

    exit_status = 2

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...]]]:
        return (type(self), (self.problems,))


class PluginError(ConfigError):
    """A plugin that cannot be loaded, or two that cannot live together."""


class CheckpointError(ColossalError):
    """A checkpoint that is missing, incomplete, damaged, or does not fit the model."""


class NonFiniteError(ColossalError):
    """The loss or the gradient norm is not a finite number, and the run's policy is to stop."""


class OutOfMemoryError(ColossalError):
    """An allocation failed. The message says what took the memory, and the smallest change of plan that would fit."""


class CommunicationError(ColossalError):
    """A collective failed, timed out, or was called differently on different ranks."""


def raise_problems(problems: Iterable[Problem], kind: type[ConfigError] = ConfigError) -> None:
    """Raises `kind` with all problems, in order and without repetition, when there is one."""
    found: list[Problem] = []
    for problem in problems:  # a value may be a list, which has no hash
        if problem not in found:
            found.append(problem)
    if found:
        raise kind(found)
