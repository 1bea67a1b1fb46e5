"""The state of a rank whose parameters a strategy has cut: its own part, in the dtypes of training."""

from __future__ import annotations

import torch
from torch import nn

from colossal_core.config import parse_config
from colossal_core.layout import DimCut, ParameterLayout, Placement, fill_full
from colossal_core.local_state import LocalState
from colossal_core.mesh import MeshLayout
from colossal_core.modules import ParameterSlots
from colossal_core.plugins import discover
from colossal_core.precision import Precision, precision_of

MESH = MeshLayout((1, 1, 2, 1, 2))
PACKED = DimCut(0, ("tp",), (((0, 2), (5, 7)), ((2, 5), (7, 8))))
PADDED = DimCut(1, ("tp",), (((0, 2),), ((2, 3),)), padding=(0, 1))


def precision(name: str) -> Precision:
    return precision_of(parse_config({"precision": name, "batch": {"global_size": 2}}, discover([]).config_class()))


def layouts() -> dict[str, ParameterLayout]:
    def layout(name: str, shape: tuple[int, ...], *cuts: DimCut) -> ParameterLayout:
        copies = ("dp_shard",) if cuts else ("dp_shard", "tp")
        placement = Placement(shape, cuts, replicated=copies, partial=("dp_shard",))
        return ParameterLayout(name, shape, placement, placement)

    found = [layout("0.weight", (8, 3), PACKED), layout("0.bias", (8,), PACKED), layout("1.weight", (2, 3), PADDED)]
    return {item.full_name: item for item in [*found, layout("1.bias", (2,))]}


def state_of(model: nn.Module, rank: int, name: str) -> LocalState:
    slots = ParameterSlots(model, [[key] for key, _ in model.named_parameters()])
    return LocalState(slots, layouts(), precision(name), torch.device("cpu"), MESH, MESH.coordinate(rank))


def test_each_rank_keeps_and_trains_its_part() -> None:
    full = {name: torch.randn(layout.shape) for name, layout in layouts().items()}
    found = {name: torch.full(layout.shape, torch.nan) for name, layout in layouts().items()}
    for rank in range(4):
        model = nn.Sequential(nn.Linear(3, 8), nn.Linear(3, 2))
        state = state_of(model, rank, "fp32")
        for name, value in full.items():
            state.fill(name, value)
        shards = state.shards
        assert all(shard.master is shard.parameter for shard in shards.values())
        assert model.get_parameter("0.weight").shape == (4, 3)
        assert model.get_parameter("1.weight").shape == (2, 2)
        for name, shard in shards.items():
            fill_full(found[name], shard.master.detach(), layouts()[name].state.pieces(MESH.coordinate(rank), MESH))
        if rank % 2:
            assert torch.equal(model.get_parameter("1.weight")[:, 1], torch.zeros(2))
        state.begin_step()
        model[0](torch.ones(2, 3)).sum().backward()
        state.finish_reduce()
        gradients = {name: shard.gradient for name, shard in shards.items() if shard.gradient is not None}
        assert torch.equal(gradients["0.weight"], torch.full((4, 3), 2.0))
        assert torch.equal(gradients["1.weight"], torch.zeros(2, 2))
    assert all(torch.equal(found[name], full[name]) for name in full)


def test_masters_have_the_shape_of_the_part() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(3, 2))
    state = state_of(model, 1, "bf16")
    full = torch.randn(8, 3)
    state.fill("0.weight", full)
    shard = state.shards["0.weight"]
    expected = torch.cat([full[2:5], full[7:8]])
    assert torch.equal(shard.master, expected)
    assert torch.equal(shard.parameter, expected.bfloat16())
    with torch.no_grad():
        shard.master.mul_(2.0)
    state.publish()
    assert torch.equal(model.get_parameter("0.weight"), (expected * 2.0).bfloat16())
