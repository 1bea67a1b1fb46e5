"""Calls of `nn.functional.dropout` in a module's own methods draw keyed numbers, and nothing else about the module changes."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from colossal_core.functional_dropout import keyed_methods
from colossal_core.keyed_dropout import KeyedDropoutState, install_keyed_dropout
from colossal_core.recompute import Recomputation, install

ORIGINAL = F.dropout


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator with a closure, as a model's forward may wear several of."""

    @functools.wraps(function)
    def counting(self: Block, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        return function(self, *args, **kwargs)

    return counting


class Base(nn.Module):
    def __init__(self, p: float = 0.4) -> None:
        super().__init__()
        self.p = p
        self.num_calls = 0
        self.up = nn.Linear(6, 6)
        self.__scale = 0.5

    def mixed(self, x: Tensor, *, times: int = 1) -> Tensor:
        """Draws by yet another name, in a loop, with a private name that the class mangles."""
        for _ in range(times):
            x = x + self.__scale * torch.nn.functional.dropout(x, p=self.p, training=self.training)
        return x


class Block(Base):
    """Four draws: two in forward, one of them in place, and two by the parent's method."""

    @counted
    @counted
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Of a block."""
        y = nn.functional.dropout(torch.tanh(self.up(x)), self.p, self.training)
        y = F.dropout(scale * y, p=self.p, training=self.training, inplace=True)
        return x + self.mixed(y, times=2)


class Twice(nn.Module):
    """Returns its draws, to be compared with one another."""

    def forward(self, x: Tensor) -> list[Tensor]:
        first = [F.dropout(x, 0.5), F.dropout(x, 0.5)]
        return first + [F.dropout(F.dropout(x, 0.0), 0.5) for _ in range(2)]


def build() -> tuple[nn.Sequential, KeyedDropoutState]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Dropout(0.2), Block()).double()
    return model, install_keyed_dropout(model)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_only_instances_are_changed() -> None:
    forward = vars(Block)["forward"]
    model, state = build()
    assert state.names == ("0", "1", "2")
    assert state.unkeyed == []
    assert list(model.state_dict()) == ["0.up.weight", "0.up.bias", "2.up.weight", "2.up.bias"]
    assert vars(Block)["forward"] is forward
    assert F.dropout is ORIGINAL
    keyed = model[0].forward
    assert keyed.__doc__ == "Of a block."
    assert inspect.signature(keyed) == inspect.signature(Block().forward)
    assert inspect.unwrap(keyed).__code__.co_firstlineno == inspect.unwrap(forward).__code__.co_firstlineno


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_cut_of_the_batch_drops_the_same(size: int, x: Tensor) -> None:
    model, state = build()
    samples = torch.arange(8) + 24
    state.set(1, 9, samples)
    whole = model(x)
    parts = []
    for rows, part in zip(samples.reshape(-1, size), x.reshape(-1, size, 5, 6), strict=True):
        state.set(1, 9, rows)
        parts.append(model(part))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    state.set(1, 10, samples)
    assert not torch.allclose(model(x), whole)
    assert model[0].num_calls == 2 * (2 + 8 // size)


def test_each_call_draws_its_own() -> None:
    module = Twice()
    state = install_keyed_dropout(module)
    state.set(1, 0, torch.arange(4))
    draws = module(torch.ones(4, 64))
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 4
    again = module(torch.ones(4, 64))
    assert all(torch.equal(one, other) for one, other in zip(draws, again, strict=True))


def test_two_models_do_not_know_each_other(x: Tensor) -> None:
    (one, first), (other, second) = build(), build()
    first.set(1, 0, torch.arange(8))
    second.set(1, 5, torch.arange(8))
    of_one = one(x)
    assert not torch.equal(of_one, other(x))
    first.clear()
    second.set(1, 0, torch.arange(8))
    assert torch.equal(of_one, other(x))


def test_outside_of_training_nothing_is_different(x: Tensor) -> None:
    model, state = build()
    torch.manual_seed(0)
    plain = nn.Sequential(Block(), nn.Dropout(0.2), Block()).double()
    torch.manual_seed(5)
    expected = plain(x)
    torch.manual_seed(5)
    assert torch.equal(model(x), expected)
    state.set(1, 0, torch.arange(8))
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_in_place_writes_to_its_input() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            F.dropout(x, 0.5, inplace=True)
            return x

    model = nn.Sequential(InPlace(), nn.Dropout(0.5, inplace=True))
    state = install_keyed_dropout(model)
    state.set(1, 0, torch.arange(4))
    x = torch.ones(4, 32)
    y = model(x)
    assert y is x
    assert set(x.unique().tolist()) == {0.0, 4.0}


def test_copies_and_pickles(x: Tensor) -> None:
    model, state = build()
    state.set(1, 0, torch.arange(8))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin.get_parameter("0.up.weight").zero_()
    assert not torch.equal(twin(x), model(x))
    state.clear()
    loaded = pickle.loads(pickle.dumps(model)).eval()
    assert torch.equal(loaded(x), model.eval()(x))


def test_recomputation_draws_the_same_again(x: Tensor) -> None:
    gradients = []
    for recompute in (False, True):
        model, state = build()
        if recompute:
            for index in (0, 2):
                install(Recomputation(model[index], [state]))
        losses = []
        for rows in torch.arange(8).reshape(2, 4):
            state.set(1, 0, rows)
            losses.append(model(x[rows]).square().sum())
        state.set(99, 99, torch.arange(4))
        for loss in losses:
            torch.autograd.backward(loss)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == 4
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# torch 2.11's own compiler still uses what torch.jit deprecates on Python 3.12.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
# Dynamo looks at the `grad` of a block's input, which is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
def test_compiled_blocks_share_one_graph(recompute: bool, x: Tensor) -> None:
    class Plain(Base):
        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.dropout(torch.tanh(self.up(x)), self.p, self.training)
            return x + self.mixed(F.dropout(y, self.p, self.training), times=2)

    torch.compiler.reset()
    model = nn.Sequential(*[Plain().double() for _ in range(4)])
    state = install_keyed_dropout(model)

    def run(step: int) -> list[Tensor]:
        model.zero_grad()
        state.set(1, step, torch.arange(8) + 8 * step)
        y = model(x)
        y.square().sum().backward()
        return [y, *[parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]]

    expected = [run(step) for step in range(3)]
    if recompute:
        for block in model:
            install(Recomputation(block, [state]))
    counter = CompileCounterWithBackend("aot_eager")
    for block in model:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
    for step in range(3):
        for mine, its in zip(run(step), expected[step], strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)
        if step == 0:
            compiled = counter.frame_count
    # The first block's input needs no gradient and the others' does: two graphs, whatever the number of blocks and steps.
    assert (compiled, counter.frame_count) == (2, 2)
    torch.compiler.reset()


def drop_and_add(x: Tensor, y: Tensor) -> Tensor:
    return x + F.dropout(y, 0.5)


class Parent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


class ByHelper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return drop_and_add(x, x)


class BySuper(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Overriding(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return x


class HandedOn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        drop: Callable[..., Tensor] = F.dropout
        return drop(x)


class Channels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.dropout1d(x))


class Static(nn.Module):
    @staticmethod
    def drop(x: Tensor) -> Tensor:
        return F.dropout(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


class Renamed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = [F.dropout(item) for self, item in enumerate(x)]
        return torch.stack(inner)


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        (Parent, []),
        (Overriding, []),
        (ByHelper, ["ByHelper.forward calls drop_and_add"]),
        (BySuper, ["Parent.forward is called by a subclass that overrides it"]),
        (HandedOn, ["HandedOn.forward hands dropout on instead of calling it"]),
        (Channels, ["Channels.forward calls dropout1d"]),
        (Static, ["Static.drop calls dropout without the module as its first argument"]),
        (Renamed, ["Renamed.forward gives `self` another meaning"]),
        (nn.TransformerEncoderLayer, []),
    ],
)
def test_what_cannot_be_keyed_is_named(kind: type[nn.Module], left: list[str]) -> None:
    assert keyed_methods(kind).left == left


def test_without_its_source_a_method_is_left_alone() -> None:
    space: dict[str, Any] = {"F": F}
    exec("def forward(self, x):\n    return F.dropout(x)", space)
    kind = type("Made", (nn.Module,), {"forward": space["forward"]})
    state = install_keyed_dropout(nn.Sequential(kind()))
    assert state.unkeyed == ["0: Made.forward has no source"]
    assert state.names == ()


def test_torchs_own_modules_that_draw_are_named() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, dropout=0.1), "b": nn.GRU(4, 4), "c": nn.Dropout2d()})
    assert install_keyed_dropout(model).unkeyed == ["a", "c"]
