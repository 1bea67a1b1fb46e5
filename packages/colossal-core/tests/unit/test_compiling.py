"""The strategy `compile`: blocks compiled one by one, alone and around recomputation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from colossal_core.anatomy import BlockChain, ModelAnatomy
from colossal_core.compiling import Compile, compile_spec
from colossal_core.config import build_config_class, parse_config
from colossal_core.config.sections import CompileConfig
from colossal_core.mesh import MeshLayout
from colossal_core.program import plain_program
from colossal_core.recompute import Recomputation, install
from colossal_core.strategy import Phase

pytestmark = [
    # Dynamo looks at `.grad` of every tensor that enters a graph, and torch warns where one is not a leaf.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # Inductor imports deprecated parts of torch
]


RUN = {"batch": {"global_size": 4}, "model": {"architecture": "llama"}, "data": {}}


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, int]:
        return x + scale * self.down(torch.tanh(self.up(x))), self.index


class Stack(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(index) for index in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, scale=0.5)[0]
        return x


class PlanOf:
    """The part of a plan that `apply` reads."""

    def __init__(self, blocks: tuple[str, ...], backend: str) -> None:
        self.decisions = {"compile": dict.fromkeys(blocks, backend)}
        self.ops = {"cross_entropy": "reference"}
        self.program = plain_program(1)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compare(num_layers: int, backend: str, budget: float | str | None) -> None:
    torch.manual_seed(0)
    model = Stack(num_layers).double()
    reference = copy.deepcopy(model)
    names = list(model.state_dict())
    if not isinstance(budget, str):
        for layer in model.layers:
            install(Recomputation(layer, [], budget))
    blocks = tuple(f"layers.{index}" for index in range(num_layers))
    plan: Any = PlanOf(blocks, backend)
    context: Any = None
    Compile(CompileConfig(enabled=True, backend=backend)).apply(model, plan, context)
    x = torch.randn(4, 8, dtype=torch.float64)
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
    reference(x).square().sum().backward()
    assert list(model.state_dict()) == names
    for mine, its in zip(model.parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None
        assert its.grad is not None
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("budget", ["plain", None, 0.5], ids=["plain", "full", "selective"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_have_the_same_gradients(backend: str, budget: float | str | None) -> None:
    compare(2, backend, budget)


def test_inductor() -> None:
    compare(1, "inductor", None)


def test_more_blocks_than_torch_recompiles_by_default() -> None:
    compare(10, "eager", "plain")


class Alike(nn.Module):
    """A block as transformers writes them: called with booleans and with a cache that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, *, use_cache: bool | None, past_key_values: Any) -> Tensor:
        assert past_key_values is None
        return x if use_cache else x + self.dropout(torch.tanh(self.up(x)))


@pytest.mark.parametrize("budget", ["plain", None, 0.5], ids=["plain", "full", "selective"])
def test_one_whole_graph_serves_all_blocks(budget: float | str | None) -> None:
    """A break in a recomputed block would leave all of it to eager; a graph for each block would cost minutes of start."""
    blocks = nn.ModuleList(Alike() for _ in range(3))
    x = torch.randn(4, 8, requires_grad=True)
    for block in blocks:
        if not isinstance(budget, str):
            recomputation = Recomputation(block, [], budget)
            recomputation.measure((x,), {"use_cache": False, "past_key_values": None})
            install(recomputation)
    counter = CompileCounterWithBackend("aot_eager")
    for block in blocks:
        vars(block)["forward"] = torch.compile(block.forward, backend=counter, fullgraph=True)
    for block in blocks:
        x = block(x, use_cache=False, past_key_values=None)
    x.sum().backward()  # type: ignore[no-untyped-call]
    assert counter.frame_count == 1


def test_the_section_is_off_by_default() -> None:
    spec = compile_spec()
    assert (spec.name, spec.section, spec.config_class) == ("compile", "compile", CompileConfig)
    assert spec.factory(CompileConfig()) is None
    made = spec.factory(CompileConfig(enabled=True))
    assert isinstance(made, Compile)
    assert (made.name, made.axes, made.phase, made.after) == ("compile", (), Phase.COMPILE, ())


def test_problems_are_told_together() -> None:
    run = parse_config(RUN, build_config_class([]))
    known = ", ".join(torch.compiler.list_backends(exclude_tags=()))
    problems = Compile(CompileConfig(enabled=True, backend="indoctor")).check(
        run, ModelAnatomy("Mine", "own-loss", (), (), untraced="TypeError: no"), MeshLayout()
    )
    assert [str(problem) for problem in problems] == [
        "compile.enabled=True: no block list was found in this model: Mine: its forward pass could not be traced (TypeError: no): use "
        "compile.enabled: false, or hold the repeated layers in a ModuleList (an example batch helps: model.example_batch)",
        f"compile.backend='indoctor': torch {torch.__version__} has no such backend: use one of {known}",
    ]


def test_the_eager_backend_does_not_go_with_recomputation() -> None:
    run = parse_config({**RUN, "recompute": {"mode": "full"}}, build_config_class([]))
    anatomy = ModelAnatomy("Mine", "own-loss", (BlockChain(("layers.0",), "structure"),), ())
    problems = Compile(CompileConfig(enabled=True, backend="eager")).check(run, anatomy, MeshLayout())
    assert [str(problem) for problem in problems] == [
        "compile.backend='eager': does not bring random numbers back when it recomputes a block: dropout would get wrong "
        "gradients: use aot_eager or inductor, or recompute.mode: none"
    ]
