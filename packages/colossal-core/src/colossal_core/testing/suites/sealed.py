"""Suites state what every plugin must do, so a subclass states facts and may add tests, but not change or remove one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

RULE = "a suite's tests cannot be changed or removed; state facts, or add tests"


class SealedSuite:
    """The parent of every suite: refuses a subclass that redefines one of its tests, when the class is made and again when it runs."""

    _sealed: ClassVar[dict[str, Callable[..., Any]]] = {}

    def __init_subclass__(cls, *, suite: bool = False) -> None:
        super().__init_subclass__()
        changed = [name for name in cls._sealed if name in vars(cls)]
        if changed:
            message = f"{cls.__name__} redefines {', '.join(changed)}: {RULE}"
            raise TypeError(message)
        if suite:
            tests = {name: value for name, value in vars(cls).items() if name.startswith("test_") and callable(value)}
            cls._sealed = {**cls._sealed, **tests}

    @classmethod
    def changed_tests(cls) -> list[str]:
        """Names of the suite's tests that were replaced or deleted after the class was made."""
        return [name for name, original in cls._sealed.items() if getattr(cls, name, None) is not original]

    @pytest.fixture(autouse=True)
    def _refuse_changes(self) -> None:
        changed = type(self).changed_tests()
        if changed:
            pytest.fail(
                f"{type(self).__name__}: {', '.join(changed)} changed or removed: a suite's tests cannot be",
                pytrace=False,
            )
