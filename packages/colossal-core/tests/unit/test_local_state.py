"""The state of a rank whose parameters a strategy has cut: its own part, in the dtypes of training."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from colossal_core.collectives import Axes, Handle, SingleProcess
from colossal_core.config import parse_config
from colossal_core.gradients import sum_on_shards
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


def test_what_other_pipeline_stages_hold_is_left_out() -> None:
    """Ranks 0 and 1 are two stages; both hold the second bias."""
    mesh = MeshLayout((2, 1, 1, 1, 1))
    held = {"0.weight": (0,), "0.bias": (0,), "1.weight": (1,), "1.bias": (0, 1)}
    shapes = {"0.weight": (8, 3), "0.bias": (8,), "1.weight": (2, 3), "1.bias": (2,)}
    found = {}
    for name, stages in held.items():
        placement = Placement(shapes[name], present=(("pp", stages),))
        found[name] = ParameterLayout(name, shapes[name], placement, placement, block=name[0])
    for rank, names in enumerate((["0.weight", "0.bias", "1.bias"], ["1.weight", "1.bias"])):
        model = nn.Sequential(nn.Linear(3, 8), nn.Linear(3, 2))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        slots = ParameterSlots(model, [[name] for name in held])
        state = LocalState(slots, found, precision("fp32"), torch.device("cpu"), mesh, mesh.coordinate(rank))
        assert list(state.shards) == names
        for name in held:
            state.fill(name, torch.full(shapes[name], 5.0))
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, torch.full(shapes[name], 5.0) if name in names else before[name])
        state.begin_step()
        state.begin_backward(last=True, units=(str(rank),))
        parameters = [state.shards[name].parameter for name in names if name.startswith(str(rank))]
        torch.autograd.backward(parameters, [torch.ones_like(parameter) for parameter in parameters])
        state.end_backward()
        state.finish_reduce()
        for name, shard in state.shards.items():
            assert shard.gradient is not None
            assert torch.equal(shard.gradient, torch.full(shapes[name], float(name.startswith(str(rank)))))


class Recorded(SingleProcess):
    """Remembers over which axes sums were asked for."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.asked: list[Axes] = []

    def start_all_reduce_coalesced(
        self, tensors: Sequence[torch.Tensor], axes: Axes, *, use: str = "reduce", tag: str = ""
    ) -> Handle:
        self.asked.append(axes)
        return super().start_all_reduce_coalesced(tensors, axes, use=use, tag=tag)


@pytest.mark.parametrize("first", ["table", "weight"])
def test_sums_over_different_axes_are_asked_for_in_one_order_on_every_stage(first: str) -> None:
    """A stage may hold its own parameters before or after those that it shares."""
    axes = {"table": ("shared:table", "dp_replicate"), "weight": ("dp_replicate",)}
    model = nn.Module()
    found = {}
    for name in sorted(axes, key=lambda name: name != first):
        model.register_parameter(name, nn.Parameter(torch.ones(2)))
        placement = Placement((2,), partial=axes[name])
        found[name] = ParameterLayout(name, (2,), placement, placement)
    slots, collectives = ParameterSlots(model, [[name] for name in found]), Recorded()
    mesh = MeshLayout()
    state = LocalState(slots, found, precision("fp32"), torch.device("cpu"), mesh, mesh.coordinate(0))
    state.finish_reduce()
    sum_on_shards(state, collectives)
    assert collectives.asked == [("dp_replicate",), ("shared:table", "dp_replicate")]


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
