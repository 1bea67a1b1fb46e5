"""Blocks run in parts, against one plain backward pass in float64: input and parameter gradients, with recomputation and without."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colossal_core.blocks import EagerBlockRunner
from colossal_core.program import SPLIT, WHOLE, Action, Program, missing_parts, plain_program
from colossal_core.recompute import Recomputation, install


class Tangled(nn.Module):
    """Everything that makes a cut hard: a weight used twice, an output that no input reaches, an unused layer, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.twice = nn.Linear(32, 32)
        self.scale = nn.Parameter(torch.randn(32))
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.num_runs = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.num_runs += 1
        y = self.twice(torch.tanh(self.twice(self.norm(x)))) + self.scale.exp()
        first, second = self.frozen(y).split(16, -1)
        return torch.cat([first * self.scale[:16], second], -1) + self.twice.weight.sum(0), self.scale * 2


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight = ctx.saved_tensors
        return gradients[0] @ weight.T, x.flatten(0, -2).T @ gradients[0].flatten(0, -2)


class WithCustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = Custom.apply(self.norm(x), self.weight)  # type: ignore[no-untyped-call]
        assert isinstance(y, Tensor)
        return nn.functional.dropout(y, 0.3)


def llama() -> tuple[nn.Module, dict[str, Any]]:
    reason = "the block of a transformers model needs transformers"
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama", reason=reason)
    config = modeling.LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = "sdpa"
    rotary = modeling.LlamaRotaryEmbedding(config)(torch.zeros(1, 8, 32), torch.arange(8)[None])
    kwargs = {"position_embeddings": tuple(table.double() for table in rotary), "attention_mask": None}
    return modeling.LlamaDecoderLayer(config, 0), kwargs


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    reason = "the block of a transformers model needs transformers"
    modeling = pytest.importorskip("transformers.models.gpt2.modeling_gpt2", reason=reason)
    config = modeling.GPT2Config(n_embd=32, n_head=4)
    config._attn_implementation = "sdpa"
    return modeling.GPT2Block(config, 0), {}


MAKERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "llama": llama,
    "gpt2": gpt2,
    "tangled": lambda: (Tangled(), {}),
    "custom": lambda: (WithCustomFunction(), {}),
}
BUDGETS: dict[str, float | None] = {"full": None, "selective": 0.5}


def tensors(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("recompute", ["none", *BUDGETS])
@pytest.mark.parametrize("kind", MAKERS)
def test_parts_equal_plain_backward(kind: str, recompute: str, split: bool) -> None:
    torch.manual_seed(0)
    block, kwargs = MAKERS[kind]()
    block = block.double()
    reference = copy.deepcopy(block)
    if recompute != "none":
        install(Recomputation(block, [], BUDGETS[recompute]))
    runner = EagerBlockRunner(block)
    for microbatch in range(2):
        x = torch.randn(2, 8, 32, dtype=torch.float64)
        plain = x.clone().requires_grad_()
        torch.manual_seed(microbatch)
        expected = tensors(reference(plain, **kwargs))
        gradients = tuple(torch.randn_like(output) for output in expected)
        torch.manual_seed(microbatch)
        output = tensors(runner.forward(microbatch, (x.clone().requires_grad_(),), kwargs))
        assert all(torch.equal(mine, its) for mine, its in zip(output, expected, strict=True))
        torch.autograd.backward(expected, gradients)
        found = (runner.backward_input if split else runner.backward)(microbatch, gradients)
        assert plain.grad is not None
        torch.testing.assert_close(found[0], plain.grad, rtol=1e-12, atol=1e-12)
    for microbatch in range(2 if split else 0):
        runner.backward_weight(microbatch)
    for (name, mine), its in zip(block.named_parameters(), reference.parameters(), strict=True):
        assert (mine.grad is None) == (its.grad is None), name
        if its.grad is not None:
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-12, atol=1e-12)
    for mine_buffer, its_buffer in zip(block.buffers(), reference.buffers(), strict=True):
        assert torch.equal(mine_buffer, its_buffer)


def test_recompute_replays_once_in_backward_input() -> None:
    block = Tangled()
    install(Recomputation(block, []))
    runner = EagerBlockRunner(block)
    output = runner.forward(0, (torch.randn(2, 8, 32, requires_grad=True),), {})
    assert block.num_runs == 1
    runner.backward_input(0, tuple(torch.ones_like(tensor) for tensor in output))
    assert block.num_runs == 2
    runner.backward_weight(0)
    assert block.num_runs == 2


def test_an_input_without_gradient_leaves_all_to_the_weight_part() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    reference = copy.deepcopy(block)
    x = torch.randn(3, 4, dtype=torch.float64)
    runner = EagerBlockRunner(block)
    output = runner.forward(0, (x,), {})
    assert runner.backward_input(0, (torch.ones_like(output),)) == (None,)
    runner.backward_weight(0)
    reference(x).sum().backward()
    for mine, its in zip(block.parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None
        assert its.grad is not None
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_the_output_is_not_held(split: bool) -> None:
    """Once it has been sent nobody needs its values: the backward parts begin at the graph behind it."""
    block = nn.Sequential(nn.Tanh(), nn.Linear(4, 4))
    runner = EagerBlockRunner(block)
    output = runner.forward(0, (torch.ones(3, 4, requires_grad=True),), {})
    alive = weakref.ref(output.untyped_storage())
    assert alive() is not None
    del output
    assert alive() is None
    (found,) = (runner.backward_input if split else runner.backward)(0, (torch.ones(3, 4),))
    assert found is not None
    if split:
        runner.backward_weight(0)
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_what_a_program_asks_of_blocks() -> None:
    split = Program(1, ((Action("forward", 0, 0), Action("backward_input", 0, 0), Action("backward_weight", 0, 0)),))
    assert EagerBlockRunner(nn.Linear(2, 2)).parts == SPLIT
    assert missing_parts(split, WHOLE) == ("backward_input", "backward_weight")
    assert missing_parts(split, SPLIT) == ()
    assert missing_parts(plain_program(2), WHOLE) == ()
