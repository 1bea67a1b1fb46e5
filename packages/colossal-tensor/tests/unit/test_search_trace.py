"""What a traced forward pass tells: who reads whom, what meets the stream, which integers are read; and the sites that follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from colossal_tensor.search.sites import find_sites, names_of, styled_sites
from colossal_tensor.search.trace import MIXED, STREAM, Trace, trace_model


class Latent(nn.Module):
    """Keys and values from a compressed latent, a gate, and experts in three-dimensional parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.latent = nn.Linear(8, 4)
        self.query, self.key, self.out = nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(2))
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 8)), nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        latent = self.latent(x)
        query, key = (part.unflatten(-1, (self.num_heads, 4)) for part in (self.query(x), self.key(latent)))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * self.scale[:, None, None] + mask
        x = x + self.out(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), key).flatten(-2))
        hidden = torch.einsum("bsd,efd->ebsf", x, self.up).relu()
        return x + torch.matmul(hidden.flatten(1, 2), self.down.transpose(1, 2)).sum(0).view_as(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Latent(), Latent()])
        self.head = nn.Linear(8, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x, mask=torch.zeros(5, 5))
        return self.head(x)  # type: ignore[no-any-return]


BLOCKS = ("layers.0", "layers.1")


@pytest.fixture(scope="module")
def trace() -> Trace:
    return trace_model(Model(), {"tokens": torch.randint(0, 10, (2, 5))}, BLOCKS)


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in Model().named_parameters()}


def test_every_product_reads_the_products_before_it(trace: Trace) -> None:
    sources = {
        product.parameter: product.sources for product in trace.products if product.parameter.startswith("layers.1")
    }
    prefix = "layers.1."
    assert sources[f"{prefix}latent.weight"] == sources[f"{prefix}query.weight"] == {STREAM}
    assert sources[f"{prefix}key.weight"] == {f"{prefix}latent.weight"}
    assert sources[f"{prefix}out.weight"] == {f"{prefix}query.weight", f"{prefix}key.weight", MIXED}
    assert sources[f"{prefix}down"] == {f"{prefix}up"}


def test_results_that_meet_the_stream(trace: Trace) -> None:
    assert {"layers.0.out.weight", "layers.0.down"} <= trace.merged
    assert not {"layers.0.query.weight", "layers.0.key.weight", "layers.0.up"} & trace.merged


def test_other_parameters_meet_the_products_they_stand_beside(trace: Trace) -> None:
    assert trace.met["layers.0.scale"] - {MIXED} == {"layers.0.query.weight", "layers.0.key.weight"}
    assert trace.met["layers.0.out.bias"] == {"layers.0.out.weight"}


def test_integers_that_were_read_and_arguments_of_the_stream(trace: Trace) -> None:
    assert ("layers.0", "num_heads", 2) in {(read.module, read.attribute, read.value) for read in trace.reads}
    given = {argument.key: argument.sources for argument in trace.arguments if argument.module == "layers.1"}
    assert given == {"0": {STREAM}, "mask": frozenset()}


def test_the_sites_of_a_block(trace: Trace) -> None:
    sites = [site for site in find_sites(trace, shapes(), ["head.weight"]) if site.rows[0].name.startswith("layers.0")]
    attention, experts = sites
    assert [(member.name, member.factors[0].dim, member.size) for member in (*attention.columns, *attention.rows)] == [
        ("layers.0.query.weight", 0, 8),
        ("layers.0.key.weight", 0, 8),
        ("layers.0.out.weight", 1, 8),
    ]
    assert attention.whole == ("layers.0.latent.weight",)
    assert attention.others == (("layers.0.scale", (2,)),)
    assert attention.by_head
    assert [bias.parameter for bias in attention.rows[0].biases] == ["layers.0.out.bias"]
    assert [(member.name, member.factors[0].dim, member.size) for member in (*experts.columns, *experts.rows)] == [
        ("layers.0.up", 1, 16),
        ("layers.0.down", 2, 16),
    ]
    assert not experts.by_head


def test_sites_that_somebody_names(trace: Trace) -> None:
    styles = {"layers.0.query.weight": "column", "layers.0.out.weight": "row", "head.weight": "row"}
    sites, alone = styled_sites(trace, shapes(), styles)
    assert [(site.columns[0].name, site.rows[0].name) for site in sites] == [
        ("layers.0.query.weight", "layers.0.out.weight")
    ]
    assert alone == ("head.weight",)


def test_patterns_have_a_star_for_what_is_alike() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Latent(), Latent()])
    model.parts = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
    names = names_of(model, ("layers.0", "layers.1"))
    assert names.pattern("layers.1.query.weight") == "layers.*.query.weight"
    assert names.pattern("parts.0.weight") == "parts.0.weight"
