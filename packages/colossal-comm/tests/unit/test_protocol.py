"""Every implementation of core's collectives takes what the protocol says: names, kinds, defaults and order of arguments."""

from __future__ import annotations

import inspect

import pytest

from colossal_comm import RankCollectives
from colossal_core.collectives import Collectives, SingleProcess

METHODS = sorted(name for name, found in vars(Collectives).items() if inspect.isfunction(found) and name[0] != "_")


def parameters(kind: type, name: str) -> list[tuple[str, object, object, object]]:
    found = inspect.signature(getattr(kind, name)).parameters.values()
    return [(each.name, each.kind, each.default, each.annotation) for each in found]


def test_the_protocol_has_its_methods() -> None:
    assert {"prepare", "start_exchange", "start_all_reduce"} <= set(METHODS)


@pytest.mark.parametrize("kind", [RankCollectives, SingleProcess])
@pytest.mark.parametrize("name", METHODS)
def test_arguments_are_those_of_the_protocol(kind: type, name: str) -> None:
    assert parameters(kind, name) == parameters(Collectives, name)
