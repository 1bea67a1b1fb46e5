"""Compiled blocks in two parts: where the backward graph is cut, what is kept in between, gradients beside a plain backward pass."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colossal_core import split_compiled
from colossal_core.backward_cut import BackwardCut, cut_backward
from colossal_core.blocks import EagerBlockRunner
from colossal_core.compiling import Compile
from colossal_core.config.sections import CompileConfig
from colossal_core.program import Action, Program
from colossal_core.recompute import Recomputation, install

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # Inductor imports deprecated parts of torch
]

WIDTH, HEADS, GROUPS, HIDDEN = 32, 4, 2, 48


class Block(nn.Module):
    """As Llama's: grouped attention and a gated MLP, both behind a norm, without biases."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.first, self.second = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, GROUPS * size, bias=False), nn.Linear(WIDTH, GROUPS * size, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y = self.first(x)
        query, key, value = (
            part(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        repeats = HEADS // GROUPS
        scores = query @ key.repeat_interleave(repeats, 1).mT / math.sqrt(WIDTH // HEADS) + bias
        mixed = scores.softmax(-1) @ value.repeat_interleave(repeats, 1)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.second(x)
        moved: Tensor = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return x + moved


class Broken(nn.Module):
    """A break in the middle, a weight in both graphs and in between, a frozen layer, biases, a weight that nothing but a sum reads."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y = self.shared(torch.tanh(self.norm(x)))
        torch._dynamo.graph_break()
        y = self.frozen(torch.tanh(self.shared(y) + self.scale.exp()))
        return y + bias.mean() + self.shared.weight.sum(0), self.scale * 2


class Drawn(torch.autograd.Function):
    """A product whose gradient is partly dropped, by what is drawn in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        drawn = gradient * torch.rand_like(gradient)
        return drawn @ weight.T, x.T @ drawn


class Identity(nn.Module):
    """`Drawn` by the identity: the gradient of the input is what was drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = Drawn.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return product


BUDGETS: dict[str, float | None] = {"full": None, "selective": 0.5}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[BackwardCut | None]:
    """What every backward graph that is compiled becomes."""
    found: list[BackwardCut | None] = []

    def noted(graph: Any, parameters: frozenset[int], count: int) -> BackwardCut | None:
        found.append(cut_backward(graph, parameters, count))
        return found[-1]

    monkeypatch.setattr(split_compiled, "cut_backward", noted)
    return found


def products(graph: torch.fx.GraphModule) -> int:
    return sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes)


BATCH, LENGTH = 2, 10
OPERANDS = (
    (WIDTH, WIDTH + 2 * (WIDTH // HEADS * GROUPS)),
    (WIDTH, WIDTH),
    (WIDTH, 2 * HIDDEN),
    (HIDDEN, WIDTH),
)
"""For q, k and v, for o, for gate and up, for down: the features that they read, and those of the gradients of their outputs."""


def check_cut(cuts: list[BackwardCut | None], *, again: int = 0) -> None:
    """All products for weights, and no other, are in the weight part; what is kept for them is no more than what they multiply.

    again: products of the forward pass that the backward graph computes once more.
    """
    (cut,) = cuts
    assert cut is not None
    assert products(cut.weights) == 7
    assert products(cut.inputs) == 7 + again
    assert cut.kept_bytes <= 8 * (BATCH * LENGTH * sum(map(sum, OPERANDS)) + 2 * WIDTH)  # and the gradients of norms


def compiled(
    blocks: list[nn.Module], backend: str, recompute: str = "none", *, dynamic: bool = False
) -> list[EagerBlockRunner]:
    """Runners of blocks that the strategy has compiled for a program that cuts backward passes."""
    model = nn.ModuleList(blocks)
    if recompute != "none":
        for block in blocks:
            install(Recomputation(block, [], BUDGETS[recompute]))

    class PlanOf:
        decisions = {"compile": {str(index): backend for index in range(len(blocks))}}
        ops: dict[str, str] = {}
        program = Program(1, ((Action("backward_input"), Action("backward_weight")),), stage_ranks=(0, 0))

    plan: Any = PlanOf()
    context: Any = None
    Compile(CompileConfig(enabled=True, backend=backend, dynamic=dynamic)).apply(model, plan, context)
    return [EagerBlockRunner(block) for block in blocks]


def tensors(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def check(blocks: list[nn.Module], backend: str, recompute: str = "none", lengths: tuple[int, ...] = (8,)) -> None:
    """Three microbatches are under way in each block; their weight parts run in another order."""
    blocks = [block.double() for block in blocks]
    references = copy.deepcopy(blocks)
    runners = compiled(blocks, backend, recompute, dynamic=len(lengths) > 1)
    for length in lengths:
        bias = torch.randn(length, length, dtype=torch.float64)
        for block, reference, runner in zip(blocks, references, runners, strict=True):
            expected = []
            for microbatch in range(3):
                x = torch.randn(2, length, WIDTH, dtype=torch.float64)
                plain = x.clone().requires_grad_()
                outputs = tensors(reference(plain, bias))
                gradients = tuple(torch.randn_like(output) for output in outputs)
                torch.autograd.backward(outputs, gradients)
                runner.forward(microbatch, (x.requires_grad_(), bias), {})
                expected.append((plain.grad, gradients))
            for microbatch, (gradient, gradients) in enumerate(expected):
                found = runner.backward_input(microbatch, gradients)
                torch.testing.assert_close(found[0], gradient, rtol=1e-12, atol=1e-12)
            assert all(parameter.grad is None for parameter in block.parameters())
            for microbatch in (2, 0, 1):
                runner.backward_weight(microbatch)
            for (name, mine), its in zip(block.named_parameters(), reference.parameters(), strict=True):
                assert (mine.grad is None) == (its.grad is None), name
                if its.grad is not None:
                    torch.testing.assert_close(mine.grad, its.grad, rtol=1e-12, atol=1e-12)
                mine.grad = its.grad = None


@pytest.mark.parametrize("recompute", ["none", *BUDGETS])
@pytest.mark.parametrize("make", [Block, Broken])
def test_parts_equal_plain_backward(make: Callable[[], nn.Module], recompute: str) -> None:
    torch.manual_seed(0)
    check([make()], "aot_eager", recompute)


def test_inductor(cuts: list[BackwardCut | None]) -> None:
    """With sequences of changing length, for which one graph is compiled."""
    torch.manual_seed(0)
    check([Block()], "inductor", lengths=(LENGTH, 14))
    check_cut(cuts[:1])


def test_blocks_of_one_code_share_their_graphs(cuts: list[BackwardCut | None]) -> None:
    """Gradients of shared graphs find the parameters of the block that ran."""
    torch.manual_seed(0)
    check([Block(), Block(), Block()], "aot_eager", lengths=(8, 12, 20))
    assert len(cuts) == 1


def test_frozen_parameters(cuts: list[BackwardCut | None]) -> None:
    """Products for what is frozen are in no part; where all is frozen nothing is left for later, where the input needs none all is."""
    torch.manual_seed(0)
    block = Block()
    block.gate.requires_grad_(False)
    check([block], "aot_eager")
    (cut,) = cuts
    assert cut is not None
    assert products(cut.weights) == 6
    cuts.clear()
    check([Block().requires_grad_(False)], "aot_eager")
    assert cuts == [None]


def test_what_a_backward_pass_draws_is_drawn_once() -> None:
    torch.manual_seed(0)
    block = Identity().double()
    (runner,) = compiled([block], "aot_eager")
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    output = runner.forward(0, (x.requires_grad_(),), {})
    (drawn,) = runner.backward_input(0, (torch.ones_like(output),))
    runner.backward_weight(0)
    assert drawn is not None
    torch.testing.assert_close(block.weight.grad, x.T @ drawn, rtol=1e-12, atol=1e-12)


def test_an_input_without_gradient_leaves_all_to_the_weight_part() -> None:
    torch.manual_seed(0)
    block = Block().double()
    reference = copy.deepcopy(block)
    (runner,) = compiled([block], "aot_eager")
    x, bias = torch.randn(2, 8, WIDTH, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    output = runner.forward(0, (x, bias), {})
    assert runner.backward_input(0, (torch.ones_like(output),)) == (None, None)
    assert all(parameter.grad is None for parameter in block.parameters())
    runner.backward_weight(0)
    reference(x, bias).sum().backward()
    for mine, its in zip(block.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-12, atol=1e-12)


def test_a_whole_backward_pass_of_a_block_that_could_be_cut() -> None:
    torch.manual_seed(0)
    block = Block().double()
    reference = copy.deepcopy(block)
    compiled([block], "aot_eager")
    x, bias = torch.randn(2, 8, WIDTH, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    block(x, bias).square().sum().backward()
    reference(x, bias).square().sum().backward()
    for mine, its in zip(block.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-12, atol=1e-12)


def test_a_graph_that_was_compiled_by_someone_else_is_exact_too() -> None:
    """Its one backward graph runs with the input part; the gradients of its parameters wait."""
    torch.manual_seed(0)
    block = Block().double()
    reference = copy.deepcopy(block)
    vars(block)["forward"] = torch.compile(block.forward, backend="aot_eager")
    runner = EagerBlockRunner(block)
    x, bias = torch.randn(2, 8, WIDTH, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    output = runner.forward(0, (x.requires_grad_(), bias), {})
    runner.backward_input(0, (torch.ones_like(output),))
    assert all(parameter.grad is None for parameter in block.parameters())
    runner.backward_weight(0)
    reference(x, bias).sum().backward()
    for mine, its in zip(block.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_where_a_block_is_cut(cuts: list[BackwardCut | None], recompute: str) -> None:
    torch.manual_seed(0)
    (runner,) = compiled([Block().double()], "aot_eager", recompute)
    x, bias = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64), torch.zeros(LENGTH, LENGTH, dtype=torch.float64)
    output = runner.forward(0, (x.requires_grad_(), bias), {})
    runner.backward_input(0, (torch.ones_like(output),))
    check_cut(cuts, again=6 if recompute == "full" else 0)


def test_what_only_the_input_part_has_used_is_freed_by_it(cuts: list[BackwardCut | None]) -> None:
    torch.manual_seed(0)
    (runner,) = compiled([Block()], "aot_eager")
    output = runner.forward(0, (torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True), torch.zeros(LENGTH, LENGTH)), {})
    gradient = torch.ones_like(output)
    (root,) = runner._kept[0].roots
    assert root is not None
    saved: tuple[Tensor, ...] = root.node.saved_tensors  # type: ignore[attr-defined]
    own = [tensor for tensor in saved if not isinstance(tensor, nn.Parameter)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in own}
    alive = [(weakref.ref(storage), storage.nbytes()) for storage in storages.values()]
    del root, saved, own, storages
    runner.backward_input(0, (gradient,))
    (cut,) = cuts
    assert cut is not None
    still = sum(size for storage, size in alive if storage() is not None)
    assert still <= min(cut.kept_bytes, sum(size for _, size in alive) / 2)
