"""From groups to layouts: every element of every parameter lies on some rank, and copies say that they are copies."""

from __future__ import annotations

import math

import pytest
import torch

from colossal_core.anatomy import ModelAnatomy, ModuleFact, ParameterFact
from colossal_core.layout import fill_full, take_local
from colossal_core.mesh import MeshLayout
from colossal_core.plan import initial_layouts
from colossal_tensor.group import Entry, Exit, Group, ParameterCut, TensorPlan, Units, Vocabulary, instances
from colossal_tensor.layouts import Laid, tensor_layouts, word_ranges

ATTENTION = Group(
    "blocks.*.attention",
    (
        ParameterCut("blocks.*.attention.q.weight", 0),
        ParameterCut("blocks.*.attention.k.weight", 0, shared=True),
        ParameterCut("blocks.*.attention.o.weight", 1),
    ),
    (Entry("blocks.*.attention"),),
    (Exit("blocks.*.attention.o"),),
    Units("heads", ("blocks.*.attention", "num_heads"), ("blocks.*.attention", "num_key_value_heads")),
)
MLP = Group(
    "blocks.*.mlp",
    (ParameterCut("blocks.*.mlp.gate_up.weight", 0, "two"), ParameterCut("blocks.*.mlp.down.weight", 1)),
    (Entry("blocks.*.mlp.gate_up"),),
    (Exit("blocks.*.mlp.down"),),
    Units("features"),
)


def anatomy(heads: int = 8, shared: int = 2, width: int = 12, words: int = 10) -> ModelAnatomy:
    """Two blocks of head size 4 and hidden size 32; the second has no feed-forward part."""
    shapes: dict[str, tuple[int, ...]] = {"table.weight": (words, 32), "blocks.0.mlp.gate_up.weight": (2 * width, 32)}
    shapes |= {"blocks.0.mlp.down.weight": (32, width), "blocks.0.norm.weight": (32,)}
    modules = [ModuleFact("table", "Embedding", ()), ModuleFact("blocks.0.mlp", "MLP", ())]
    for block in (0, 1):
        own = f"blocks.{block}.attention"
        shapes |= {f"{own}.q.weight": (heads * 4, 32), f"{own}.k.weight": (shared * 4, 32)}
        shapes |= {f"{own}.o.weight": (32, heads * 4)}
        modules.append(ModuleFact(own, "Attention", (("num_heads", heads), ("num_key_value_heads", shared))))
    facts = tuple(ParameterFact((name,), shape, "float32", True, "") for name, shape in shapes.items())
    return ModelAnatomy("Model", "causal-lm", (), facts, modules=tuple(modules))


def laid(num_ranks: int, plan: TensorPlan | None = None, found: ModelAnatomy | None = None) -> Laid:
    mesh = MeshLayout((1, 1, 2, 1, num_ranks))
    given = found or anatomy()
    return tensor_layouts(plan or TensorPlan((ATTENTION, MLP)), given, initial_layouts(given, mesh), mesh)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_parts_of_all_ranks_are_the_whole(num_ranks: int) -> None:
    plan = TensorPlan((ATTENTION, MLP), Vocabulary("table"))
    outcome = laid(num_ranks, plan)
    assert outcome.problems == ()
    mesh = outcome.mesh
    for layout in outcome.layouts.values():
        full = torch.arange(float(layout.numel)).reshape(layout.shape)
        seen, counted = torch.zeros_like(full), torch.zeros_like(full)
        for rank in range(mesh.world_size):
            coordinate = mesh.coordinate(rank)
            local = torch.zeros(layout.compute.local_shape(coordinate, mesh))
            pieces = layout.compute.pieces(coordinate, mesh)
            take_local(local, full, pieces)
            fill_full(seen, local, pieces)
            if layout.compute.owns(coordinate):
                for piece in pieces:
                    counted[piece.box] += 1
        assert torch.equal(seen, full), layout.full_name
        assert torch.equal(counted, torch.ones_like(full)), layout.full_name


def test_both_packed_weights_are_cut() -> None:
    outcome = laid(2)
    cut = outcome.layouts["blocks.0.mlp.gate_up.weight"].compute.cuts[0]
    assert cut.intervals == (((0, 6), (12, 18)), ((6, 12), (18, 24)))


def test_ranks_that_share_a_head_hold_copies_whose_gradients_are_summands() -> None:
    outcome = laid(4)
    key = outcome.layouts["blocks.1.attention.k.weight"].compute
    assert key.cuts[0].axes == ("tp_heads2",)
    assert key.replicated == ("dp_shard", "tp_copies2") and key.partial == ("dp_shard", "tp_copies2")
    query = outcome.layouts["blocks.1.attention.q.weight"].compute
    assert query.cuts[0].axes == ("tp",) and query.partial == ("dp_shard",)


def test_whole_parameters_inside_groups_have_partial_gradients() -> None:
    outcome = laid(2, TensorPlan((ATTENTION, MLP), partial=("blocks.*.norm.weight",)))
    norm = outcome.layouts["blocks.0.norm.weight"]
    assert norm.compute.partial == norm.state.partial == ("dp_shard", "tp")
    assert norm.reduce_axes == ()


def test_the_vocabulary_is_padded_where_it_does_not_divide() -> None:
    outcome = laid(4, TensorPlan((), Vocabulary("table")))
    table, mesh = outcome.layouts["table.weight"].compute, outcome.mesh
    assert outcome.cutting.words == ((0, 3), (3, 6), (6, 9), (9, 10)) and outcome.cutting.padded_words == 3
    assert {table.local_shape(mesh.coordinate(rank), mesh) for rank in range(8)} == {(3, 32)}


def test_a_large_vocabulary_is_cut_in_multiples_of_64() -> None:
    words, padded = word_ranges(50257, 4)
    assert padded == 12608 and math.ceil(50257 / 4) == 12565
    assert words[-1] == (37824, 50257)


def test_what_cannot_be_cut_names_sizes_that_work() -> None:
    problems = laid(3).problems
    assert [str(problem) for problem in problems] == [
        "parallel.tensor.size=3: blocks.0.attention has 8 heads and 2 key/value heads, which 3 ranks cannot share: "
        "use 2 or 4, or a rule `replicate` for it"
    ]
    narrow = laid(4, TensorPlan((MLP,)), anatomy(width=3)).problems
    assert [str(problem) for problem in narrow] == [
        "parallel.tensor.size=4: blocks.0.mlp is 3 features wide, which 4 ranks cannot share: "
        "use 3, or a rule `replicate` for it"
    ]


def test_a_group_stands_wherever_all_its_parameters_are() -> None:
    found = anatomy()
    modules, parameters = [fact.name for fact in found.modules], [fact.full_name for fact in found.parameters]
    assert [group.name for group in instances(MLP, modules, parameters)] == ["blocks.0.mlp"]
    assert [group.name for group in instances(ATTENTION, modules, parameters)] == [
        "blocks.0.attention",
        "blocks.1.attention",
    ]
