"""The anatomy of modules that no library knows."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor, nn

from colossal_core.anatomy import BlockChain
from colossal_core.examine import examine
from colossal_core.transformers_plans import unknown_styles


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("scratch", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x + self.inner(x) * self.scale, 1


class Stack(nn.Module):
    def __init__(self, blocks: list[nn.Module], *, by_value: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 4)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 16)
        self.by_value = by_value

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.by_value:
            x = x * x.sum().item()
        for block in self.blocks:
            x = block(x)[0]
        logits = self.head(x)
        assert isinstance(logits, Tensor)
        return logits


class NoList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor, **anything: Tensor) -> Tensor:
        y = self.second(self.first(x))
        assert isinstance(y, Tensor)
        return y


TOKENS = {"tokens": torch.zeros(2, 3, dtype=torch.long)}


def test_a_plain_stack() -> None:
    model = Stack([Block() for _ in range(3)])
    anatomy = examine(model, TOKENS)
    assert anatomy.chains == (BlockChain(("blocks.0", "blocks.1", "blocks.2"), "data flow"),)
    assert anatomy.embeddings == ("embedding",)
    assert anatomy.heads == ("head",)
    assert anatomy.vocab_size == 16
    assert anatomy.task == "own-loss"
    assert anatomy.forward_keys == ("tokens",)
    assert anatomy.buffers == ("blocks.0.scale", "blocks.1.scale", "blocks.2.scale")
    assert anatomy.parameters[0].full_name == "embedding.weight"
    assert anatomy.parameters[0].block == ""
    assert anatomy.parameters[1].full_name == "blocks.0.inner.0.weight"
    assert anatomy.parameters[1].block == "blocks.0"
    assert anatomy.parameters[1].dtype == "float32"
    assert anatomy.tensor_plan == ()


def test_without_an_example_the_list_is_found_by_structure() -> None:
    anatomy = examine(Stack([Block() for _ in range(3)]))
    assert anatomy.chains == (BlockChain(("blocks.0", "blocks.1", "blocks.2"), "structure"),)
    assert anatomy.untraced == "no example batch is known for this class of model"


def test_a_forward_that_looks_at_values_is_found_by_structure() -> None:
    anatomy = examine(Stack([Block(), Block()], by_value=True), TOKENS)
    assert anatomy.chains == (BlockChain(("blocks.0", "blocks.1"), "structure"),)
    assert anatomy.untraced == "RuntimeError: Tensor.item() cannot be called on meta tensors"


class Wary(Stack):
    """Asks what it is given, as transformers' models do of padding tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        if 3 in tokens[:, -1] or tokens.eq(3).any():
            tokens = tokens.clone()
        return super().forward(tokens)


def test_a_forward_that_asks_about_values_is_traced_with_an_answer() -> None:
    anatomy = examine(Wary([Block(), Block()]), TOKENS)
    assert anatomy.chains == (BlockChain(("blocks.0", "blocks.1"), "data flow"),)
    assert anatomy.untraced == ""


def test_a_sequential_mlp_is_a_chain_of_its_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    traced = examine(model, {"input": torch.zeros(2, 4)})
    assert traced.chains == (BlockChain(("0", "1", "2"), "data flow"),)
    assert [fact.block for fact in traced.parameters] == ["0", "0", "2", "2"]
    assert examine(model).chains == (BlockChain(("0", "1", "2"), "structure"),)


def test_a_shared_block_is_named_once_and_owns_its_parameters_under_every_name() -> None:
    shared, other = Block(), Block()
    anatomy = examine(Stack([shared, other, shared]), TOKENS)
    assert anatomy.chains == (BlockChain(("blocks.0", "blocks.1"), "data flow", repeated=("blocks.0",)),)
    fact = next(fact for fact in anatomy.parameters if fact.full_name == "blocks.0.inner.0.weight")
    assert fact.names == ("blocks.0.inner.0.weight", "blocks.2.inner.0.weight")
    assert fact.block == "blocks.0"


def test_a_weight_tied_between_blocks_belongs_to_none() -> None:
    first, second = Block(), Block()
    layer, other = first.inner[0], second.inner[0]
    assert isinstance(layer, nn.Linear)
    assert isinstance(other, nn.Linear)
    other.weight = layer.weight
    anatomy = examine(Stack([first, second]), TOKENS)
    assert anatomy.tied == (("blocks.0.inner.0.weight", "blocks.1.inner.0.weight"),)
    assert {fact.full_name: fact.block for fact in anatomy.parameters}["blocks.0.inner.0.weight"] == ""


def test_a_model_with_no_list_has_no_blocks_and_takes_any_key() -> None:
    anatomy = examine(NoList(), {"x": torch.zeros(2, 4)})
    assert anatomy.chains == ()
    assert anatomy.forward_keys is None


def test_no_real_memory_is_needed() -> None:
    with torch.device("meta"):
        model = Stack([Block() for _ in range(2)])
        model.head = nn.Linear(4, 2_000_000_000)
    assert examine(model, TOKENS).blocks == ("blocks.0", "blocks.1")


def test_unknown_styles_are_reported_by_name() -> None:
    plan = (("layers.*.a", "unknown:brand_new"), ("layers.*.b", "column"), ("layers.*.c", "unknown:brand_new"))
    assert unknown_styles(plan) == ("brand_new",)


def test_core_examines_without_transformers() -> None:
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch; from colossal_core.examine import examine\n"
        "print(examine(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())).blocks)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "('0', '1')"
