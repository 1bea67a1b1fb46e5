"""Dropout keyed by sample: the same for one rank or many, any microbatch, recomputed or not, compiled or not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from colossal_core.keyed_dropout import KeyedDropoutState, install_keyed_dropout


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.dropout(torch.tanh(self.linear(x)))
        return y


def build() -> tuple[nn.Sequential, KeyedDropoutState]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.1), Block(), Block(), nn.Dropout(0.2)).double()
    return model, install_keyed_dropout(model)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_names_stay_and_every_dropout_is_found() -> None:
    model, state = build()
    assert state.names == ("0", "1.dropout", "2.dropout", "3")
    assert list(model.state_dict()) == ["1.linear.weight", "1.linear.bias", "2.linear.weight", "2.linear.bias"]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_cut_of_the_batch_drops_the_same(size: int, x: torch.Tensor) -> None:
    model, state = build()
    samples = torch.arange(8) + 24
    state.set(seed=1, step=9, sample_ids=samples)
    whole = model(x)
    parts = []
    for rows, part in zip(samples.reshape(-1, size), x.reshape(-1, size, 5, 6), strict=True):
        state.set(seed=1, step=9, sample_ids=rows)
        parts.append(model(part))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.cat(parts) == 0, whole == 0)
    state.set(seed=1, step=10, sample_ids=samples)
    assert not torch.equal(model(x), whole)


def test_a_cut_sequence_drops_the_same(x: torch.Tensor) -> None:
    model, state = build()
    samples = torch.arange(8)
    state.set(1, 0, samples)
    whole = model(x)
    for positions in (torch.tensor([0, 1, 4]), torch.tensor([3, 2])):
        state.set(1, 0, samples, positions)
        assert torch.equal(model(x[:, positions]), whole[:, positions])


def test_layers_drop_differently() -> None:
    model, state = build()
    ones = torch.ones(4, 16, 32, dtype=torch.float64)
    state.set(1, 0, torch.arange(4))
    first, second = model[1], model[2]
    assert isinstance(first, Block)
    assert isinstance(second, Block)
    assert not torch.equal(first.dropout(ones), second.dropout(ones))


def test_flattened_rows_drop_as_their_samples_do(x: torch.Tensor) -> None:
    model, state = build()
    state.set(1, 0, torch.arange(8))
    assert torch.equal(model(x.reshape(40, 6)), model(x).reshape(40, 6))


def test_eval_mode_and_no_step_are_untouched(x: torch.Tensor) -> None:
    model, state = build()
    torch.manual_seed(5)
    outside = model(x)
    torch.manual_seed(5)
    assert torch.equal(model(x), outside)
    state.set(1, 0, torch.arange(8))
    keyed = model(x)
    torch.manual_seed(5)
    state.clear()
    assert torch.equal(model(x), outside)
    assert not torch.equal(keyed, outside)
    state.set(1, 0, torch.arange(8))
    model.eval()
    assert torch.equal(model(x), model[2](model[1](x)))


def test_what_has_no_samples_falls_back_and_is_named() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5))
    state = install_keyed_dropout(model)
    assert state.names == ("0",)
    assert state.unkeyed == ["1"]
    state.set(1, 0, torch.arange(2))
    dropout = model[0]
    torch.manual_seed(3)
    y = dropout(torch.ones(3, 4))
    torch.manual_seed(3)
    assert torch.equal(y, nn.functional.dropout(torch.ones(3, 4), 0.5))
    dropout(torch.ones(3, 4))
    assert state.unkeyed == ["1", "0"]


def test_recomputation_replays_its_own_microbatch(x: torch.Tensor) -> None:
    model, state = build()

    def recomputed(block: nn.Module, y: torch.Tensor) -> torch.Tensor:
        saved = state.capture()

        def run(z: torch.Tensor) -> torch.Tensor:
            with state.replay(saved):
                out: torch.Tensor = block(z)
            return out

        out: torch.Tensor = checkpoint(run, y, use_reentrant=False)
        return out

    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        losses = []
        for microbatch in range(2):
            rows = torch.arange(4) + 4 * microbatch
            state.set(1, 0, rows)
            y = x[rows]
            for block in model:
                y = recomputed(block, y) if recompute else block(y)
            losses.append(y.square().sum())
        state.set(99, 99, torch.arange(4))
        for loss in losses:
            torch.autograd.backward(loss)
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_replay_puts_the_state_back_after_an_error() -> None:
    _, state = build()
    state.set(1, 0, torch.arange(2))
    before = state.capture()
    with pytest.raises(ValueError, match="stop"), state.replay(None):
        raise ValueError("stop")
    assert state.capture() is before
    state.restore(None)
    assert state.capture() is None


def test_a_copy_of_the_model_follows_its_own_mode(x: torch.Tensor) -> None:
    model, state = build()
    state.set(1, 0, torch.arange(8))
    twin = copy.deepcopy(model).eval()
    assert not torch.equal(model(x), x)
    assert torch.equal(twin(x), twin[2](twin[1](x)))


# torch 2.11's own compiler still uses what torch.jit deprecates on Python 3.12.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
# Dynamo looks at the `grad` of a block's input, which is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
def test_compiled_blocks_drop_the_same_and_share_one_graph(x: torch.Tensor) -> None:
    torch.compiler.reset()
    blocks = [Block().double() for _ in range(10)]
    state = install_keyed_dropout(nn.ModuleList(blocks))

    def run(step: int) -> torch.Tensor:
        state.set(1, step, torch.arange(8) + 8 * step)
        y = x
        for block in blocks:
            y = block(y)
        return y

    expected = [run(step) for step in range(4)]
    counter = CompileCounterWithBackend("aot_eager")
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)  # type: ignore[method-assign]
    assert torch.equal(run(0), expected[0])
    compiled = counter.frame_count
    for step in range(1, 4):
        assert torch.equal(run(step), expected[step])
    # The first block's input needs no gradient and the others' does: two graphs, whatever the number of blocks and steps.
    assert (compiled, counter.frame_count) == (2, 2)
