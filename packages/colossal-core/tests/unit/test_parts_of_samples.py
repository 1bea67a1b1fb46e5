"""Dropout in modules that see a part of each sample: the numbers of that part of the whole; fused kernels draw their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from colossal_core.fake_model import fake_copy
from colossal_core.fused_part import seed_by_part
from colossal_core.keyed_dropout import KeyedDropoutState, KeyedLayer, Part, Share, install_keyed_dropout
from colossal_core.streams import ModelRandom

SAMPLES = torch.tensor([3, 7])


def build() -> tuple[nn.Dropout, KeyedLayer, KeyedDropoutState]:
    dropout = nn.Dropout(0.5)
    state = install_keyed_dropout(dropout)
    layer = dropout.keyed_layer
    assert isinstance(layer, KeyedLayer)
    state.set(1, 0, SAMPLES)
    return dropout, layer, state


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((2, 5, 4, 4), 1),
        ((2, 5, 6), -1),
        ((2, 5, 6), 1),
        ((10, 6), 0),
        ((10, 6), -1),
        ((10, 4, 4), 0),
        ((2, 3, 5, 4), 2),
    ],
)
def test_a_part_drops_as_it_does_in_the_whole(shape: tuple[int, ...], dim: int) -> None:
    dropout, layer, _ = build()
    x = torch.ones(shape)
    whole = dropout(x)
    rows = shape[0] // 2
    total = rows if dim == 0 else shape[dim]
    for start, stop in ((0, 2), (2, total)):
        layer.part = Part(dim, start, total)
        if dim == 0:
            kept = [index for index in range(shape[0]) if start <= index % rows < stop]
            part, expected = x[kept], whole[kept]
        else:
            part, expected = x.narrow(dim, start, stop - start), whole.narrow(dim, start, stop - start)
        assert torch.equal(dropout(part), expected)
    layer.part = Part(dim, 0, total)
    assert torch.equal(dropout(x), whole)


def test_units_drop_as_they_do_in_the_whole() -> None:
    """The second and third of four, whatever their size, and one of two."""
    dropout, layer, _ = build()
    for shape, dim in (((2, 4, 3, 3), 1), ((2, 5, 8), 2), ((2, 8, 6), 1)):
        x = torch.ones(shape)
        layer.part = None
        whole, unit = dropout(x), shape[dim] // 4
        layer.part = Share(dim, 1, 4, 2)
        assert torch.equal(dropout(x.narrow(dim, unit, 2 * unit)), whole.narrow(dim, unit, 2 * unit))
        layer.part = Share(dim, 1, 2)
        assert torch.equal(dropout(x.narrow(dim, 2 * unit, 2 * unit)), whole.narrow(dim, 2 * unit, 2 * unit))


def test_a_part_of_a_sequence_that_is_cut_already() -> None:
    dropout, layer, state = build()
    x = torch.ones(2, 8, 6)
    whole = dropout(x)
    positions = torch.tensor([0, 1, 6, 7])
    state.set(1, 0, SAMPLES, positions)
    layer.part = Part(1, 2, 4)
    assert torch.equal(dropout(x[:, :2]), whole[:, [6, 7]])
    layer.part = Part(-1, 1, 6)
    assert torch.equal(dropout(x[:, :4, 1:4]), whole[:, positions, 1:4])


def test_a_part_is_compiled_once_and_copied() -> None:
    torch.compiler.reset()
    blocks = nn.ModuleList(nn.Dropout(0.5) for _ in range(4))
    state = install_keyed_dropout(blocks)
    x = torch.ones(2, 6, 4)
    for block in blocks:
        block.keyed_layer.part = Part(1, 2, 8)  # type: ignore[union-attr]
    state.set(1, 0, SAMPLES)
    expected = [block(x) for block in blocks]
    shadow = fake_copy(blocks, torch.float32, ())
    assert shadow.model.get_submodule("0").keyed_layer.part == Part(1, 2, 8)  # type: ignore[union-attr]
    counter = CompileCounterWithBackend("aot_eager")
    for block, kept in zip(blocks, expected, strict=True):
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
        assert torch.equal(block(x), kept)
    assert counter.frame_count == 1


class Fused(nn.Module):
    """Draws as a fused kernel does, from torch's generator: a number for each element of its part."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, flag: bool = False) -> tuple[torch.Tensor, None]:
        del flag
        heads = self.linear(x).expand(self.size, -1, -1)
        return torch.nn.functional.dropout(heads, 0.5), None


class Stack(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = Fused(size), Fused(size)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first, second = self.first(x, flag=True)[0], self.second(x=x)[0]
        return first, second, torch.rand(3)


def stack(size: int, coordinate: int) -> tuple[Stack, ModelRandom]:
    torch.manual_seed(0)
    model = Stack(size)
    random = ModelRandom(nn.Linear(1, 1), seed=5)
    for number, module in enumerate((model.first, model.second)):
        seed_by_part(module, random.dropout, number, coordinate)
    random.seed(2, 6, torch.tensor([6, 7]))
    return model, random


def dropped(model: Stack) -> list[torch.Tensor]:
    first, second, later = model(torch.ones(2, 4))
    return [first == 0, second == 0, later]


def test_ranks_draw_their_own_numbers_and_then_the_same_again() -> None:
    zero, one = dropped(stack(6, 0)[0]), dropped(stack(6, 1)[0])
    uneven = dropped(stack(9, 1)[0])
    assert not torch.equal(zero[0], one[0])
    assert not torch.equal(zero[0], zero[1])
    assert torch.equal(zero[2], one[2])
    assert torch.equal(one[2], uneven[2])
    assert all(torch.equal(a, b) for a, b in zip(zero, dropped(stack(6, 0)[0]), strict=True))


def test_microbatches_differ_and_recomputation_replays() -> None:
    model, random = stack(6, 1)
    saved = random.dropout.capture()
    first = dropped(model)
    random.seed(2, 8, torch.tensor([8, 9]))
    assert not torch.equal(dropped(model)[0], first[0])
    with random.dropout.replay(saved):
        again = dropped(model)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_outside_of_a_step_and_in_evaluation_nothing_is_seeded() -> None:
    model, random = stack(6, 1)

    def after(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        later: torch.Tensor = model(torch.ones(2, 4))[2]
        return later

    assert torch.equal(after(4), after(5))
    model.eval()
    assert not torch.equal(after(4), after(5))
    model.train()
    random.dropout.clear()
    assert not torch.equal(after(4), after(5))


def test_a_copy_of_the_model_follows_the_same_key() -> None:
    model, random = stack(6, 1)
    twin = copy.deepcopy(model)
    random.seed(2, 8, torch.tensor([8, 9]))
    assert all(torch.equal(a, b) for a, b in zip(dropped(model), dropped(twin), strict=True))


# torch 2.11's own compiler still uses what torch.jit deprecates on Python 3.12.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_it_draws_the_same() -> None:
    torch.compiler.reset()
    model, random = stack(6, 1)
    expected = dropped(model)
    random.seed(2, 8, torch.tensor([8, 9]))
    other = dropped(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for first_sample, kept in ((6, expected), (8, other)):
        random.seed(2, first_sample, torch.tensor([first_sample, first_sample + 1]))
        x = torch.ones(2, 4, requires_grad=True)
        first, second, later = compiled(x)
        assert [torch.equal(a, b) for a, b in zip([first == 0, second == 0, later], kept, strict=True)] == [True] * 3
        (first.sum() + second.sum()).backward()
        assert x.grad is not None
        assert bool((x.grad != 0).any())
