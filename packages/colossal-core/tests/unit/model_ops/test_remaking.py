"""Methods made anew from their source: what stays, what changes, and what is left alone."""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.model_ops.remaking import Source, is_remade, methods_of, place_of, put, source_of

FACTOR = 3.0


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def around(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs) + 1.0

    return around


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, *, more: float = 0.5) -> torch.Tensor:
        """A text
        of two lines.
        """
        total = torch.add(x, more)
        for _ in range(2):
            total = total * FACTOR
        return total

    @decorated
    def around(self, x: torch.Tensor) -> Any:
        return x * FACTOR

    def _kept(self, x: torch.Tensor) -> Any:
        return super().__call__(x) * FACTOR

    def mangled(self) -> float:
        self.__own = 1.0
        return self.__own


def doubled(source: Source) -> FunctionType:
    """The method with FACTOR, wherever it stands, read through a function."""
    places = [place_of(node) for node in ast.walk(source.tree) if isinstance(node, ast.Name) and node.id == "FACTOR"]
    change = lambda node: ast.Call(ast.Name("twice", ast.Load()), [node], [])  # noqa: E731 - one expression
    return source.changed({place: change for place in places if place is not None}, {"twice": lambda value: 2 * value})


def source(method: str) -> Source:
    found = source_of(vars(Scaled)[method])
    assert found is not None
    return found


def test_a_changed_method_keeps_globals_defaults_and_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = doubled(source("forward")), vars(Scaled)["forward"]
    module = Scaled()
    put(module, "forward", made)
    assert torch.equal(module(torch.ones(2)), torch.full((2,), 54.0))
    assert torch.equal(module(torch.ones(2), more=0.0), torch.full((2,), 36.0))
    assert made.__globals__ is original.__globals__
    assert (made.__kwdefaults__, made.__annotations__, made.__name__) == (
        original.__kwdefaults__,
        original.__annotations__,
        original.__name__,
    )
    assert made.__code__.co_filename == original.__code__.co_filename
    assert made.__code__.co_firstlineno == original.__code__.co_firstlineno
    monkeypatch.setitem(original.__globals__, "FACTOR", 1.0)
    assert torch.equal(module(torch.ones(2)), torch.full((2,), 6.0))


def test_another_module_of_the_class_and_the_source_stay_as_they_were() -> None:
    found = source("forward")
    before = ast.dump(found.tree)
    module = Scaled()
    put(module, "forward", doubled(found))
    assert torch.equal(Scaled()(torch.ones(2)), torch.full((2,), 13.5))
    assert ast.dump(found.tree) == before
    assert is_remade(vars(module)["forward"].__func__)
    assert not is_remade(Scaled.forward)


def test_a_copy_of_a_module_calls_its_method_on_itself() -> None:
    module = Scaled()
    put(module, "forward", doubled(source("forward")))
    copied = copy.deepcopy(module)
    assert vars(copied)["forward"].__self__ is copied


def test_a_decorator_stays_around_a_method() -> None:
    module = Scaled()
    put(module, "around", doubled(source("around")))
    assert float(module.around(torch.ones(()))) == 7.0
    assert float(Scaled().around(torch.ones(()))) == 4.0


def test_a_method_that_calls_super_keeps_its_class() -> None:
    module = Scaled()
    put(module, "_kept", doubled(source("_kept")))
    assert float(module._kept(torch.ones(()))) == 13.5 * 6.0


def made_without_source() -> Callable[..., Any]:
    space: dict[str, Any] = {}
    exec("def forward(self, x):\n    return x\n", space)
    found: Callable[..., Any] = space["forward"]
    return found


def through_nothing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def around(self: Any) -> Any:
        return getattr(self, "other")()  # noqa: B009 - a wrapper that holds no function

    return around


@pytest.mark.parametrize(
    "function",
    [vars(Scaled)["mangled"], made_without_source(), through_nothing(Scaled.forward)],
    ids=["name", "none", "hidden"],
)
def test_what_cannot_be_made_anew_has_no_source(function: FunctionType) -> None:
    assert source_of(function) is None


def test_methods_are_those_of_the_class_unless_somebody_has_put_a_forward_on_the_module() -> None:
    assert {name for name, _ in methods_of(Scaled())} == {"forward", "around", "_kept", "mangled"}
    module = Scaled()
    vars(module)["forward"] = torch.relu
    assert list(methods_of(module)) == []
    module = Scaled()
    vars(module)["around"] = torch.relu
    assert {name for name, _ in methods_of(module)} == {"forward", "_kept", "mangled"}
