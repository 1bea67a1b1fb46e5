"""The proof accepts what is exact and rejects every plan that is not: a message left out, a bias added twice, a wrong order of parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colossal_core.specimen import SpecimenError
from colossal_tensor.group import Entry, Exit, Group, ParameterCut, Scaled, TensorPlan, Units, Vocabulary
from colossal_tensor.search.laboratory import Laboratory, laboratory


class Attention(nn.Module):
    """Query, key and value in one weight; a norm of each head's query; a bias in the row."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.width = 4, 32
        self.qkv = nn.Linear(32, 96)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.num_heads, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        scores = self.norm(query) @ key.transpose(-1, -2)
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 20, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Small:
    """A specimen of any module."""

    make: Callable[[], nn.Module]
    key: str = "small"
    answers: dict[object, object] = field(default_factory=dict)

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make()

    def batch(self) -> dict[str, Tensor]:
        return {"tokens": torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))}


MLP = Group(
    "blocks.*",
    (
        ParameterCut("blocks.*.up.weight", 0),
        ParameterCut("blocks.*.up.bias", 0),
        ParameterCut("blocks.*.down.weight", 1),
    ),
    (Entry("blocks.*.up"),),
    (Exit("blocks.*.down", biases=("blocks.*.down.bias",)),),
    Units("features"),
)
ATTENTION = Group(
    "blocks.*.attention",
    (
        ParameterCut("blocks.*.attention.qkv.weight", 0, "three"),
        ParameterCut("blocks.*.attention.qkv.bias", 0, "three"),
        ParameterCut("blocks.*.attention.out.weight", 1),
    ),
    (Entry("blocks.*.attention"),),
    (Exit("blocks.*.attention.out", biases=("blocks.*.attention.out.bias",)),),
    Units("heads", ("blocks.*.attention", "num_heads")),
    (Scaled("blocks.*.attention", "num_heads"),),
)


@pytest.fixture(scope="module")
def lab() -> Laboratory:
    return laboratory(Small(Model))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_an_exact_plan_passes_and_tells_summands_from_whole_gradients(lab: Laboratory, num_ranks: int) -> None:
    outcome = lab.proof.run(TensorPlan(groups=(ATTENTION, MLP)), num_ranks)
    assert outcome.problem == ""
    assert outcome.partial == (
        "blocks.*.attention.norm.bias",
        "blocks.*.attention.norm.weight",
        "blocks.*.attention.out.bias",
        "blocks.*.down.bias",
    )


def test_the_vocabulary_is_cut_with_the_groups(lab: Laboratory) -> None:
    plan = TensorPlan(groups=(ATTENTION, MLP), vocabulary=Vocabulary("table", "head"))
    for num_ranks in (2, 3):  # 20 words on three ranks: the last part is padded
        assert lab.proof.run(plan, num_ranks).problem == ""


MUTANTS = {
    "an entry is left out": (replace(MLP, entries=()), "the gradient of table.weight differs by"),
    "an exit is left out": (replace(MLP, exits=()), "an output differs by"),
    "a bias is added by every rank": (replace(MLP, exits=(Exit("blocks.*.down"),)), "an output differs by"),
    "a column's bias is whole": (replace(MLP, cuts=(MLP.cuts[0], MLP.cuts[2])), "RuntimeError: The expanded size"),
    "a number of heads is whole": (replace(ATTENTION, scaled=()), "RuntimeError: unflatten: Provided sizes"),
    "query, key and value are taken for one": (
        replace(ATTENTION, cuts=tuple(replace(cut, packing="whole") for cut in ATTENTION.cuts)),
        "an output differs by",
    ),
    "an entry stands after the first product": (
        replace(ATTENTION, entries=(Entry("blocks.*.attention.norm"),)),
        "the gradient of table.weight differs by",
    ),
    "a number that no module has": (
        replace(ATTENTION, units=Units("heads", ("blocks.*", "heads"))),
        "blocks.0.attention has 1 heads, which 2 ranks cannot share",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_plan_that_is_not_exact_is_rejected(lab: Laboratory, name: str) -> None:
    group, said = MUTANTS[name]
    outcome = lab.proof.run(TensorPlan(groups=(group,)))
    assert not outcome.passed
    assert outcome.problem.startswith(said), outcome.problem


def test_a_proof_is_the_same_each_time(lab: Laboratory) -> None:
    plan = TensorPlan(groups=(replace(MLP, exits=()),))
    assert lab.proof.run(plan) == lab.proof.run(plan)


class Bypassing(Block):
    """In training it takes a layer's weight past the layer, where no exit can stand."""

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.up(x))
        return x + (F.linear(inner, self.down.weight, self.down.bias) if self.training else self.down(inner))


class DrawingOutside(Block):
    """Draws for activations that are whole on every rank."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x * torch.rand_like(x))))  # type: ignore[no-any-return]


class DrawingInside(Block):
    """Draws for features of which a rank has a part."""

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.up(x))
        return x + self.down(inner * torch.rand_like(inner))  # type: ignore[no-any-return]


class Dropping(Block):
    """Drops in training, of which the proof turns off what it can find."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.dropout_rate = nn.Dropout(0.5), 0.5

    def forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(torch.relu(self.up(x)), self.dropout_rate, self.training)
        return x + self.drop(self.down(inner))  # type: ignore[no-any-return]


def model_of(kind: type[Block]) -> nn.Module:
    model = Model()
    model.blocks = nn.ModuleList([kind(), kind()])
    return model


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Bypassing, "an output differs by"),
        (DrawingOutside, ""),
        (DrawingInside, "an output differs by"),
        (Dropping, ""),
    ],
)
def test_a_model_is_tried_as_it_trains(kind: type[Block], said: str) -> None:
    outcome = laboratory(Small(partial(model_of, kind))).proof.run(TensorPlan(groups=(MLP,)))
    assert outcome.passed == (said == "")
    assert outcome.problem.startswith(said), outcome.problem


class Failing(Block):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no such thing")


def test_a_model_that_does_not_run_is_no_specimen() -> None:
    with pytest.raises(SpecimenError) as caught:
        laboratory(Small(partial(model_of, Failing)))
    assert str(caught.value) == "it does not run (ValueError: no such thing)"
