"""Random numbers of modules that see a part of each sample: those of their part of the whole, so that no cut changes what is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from colossal_core.fused_part import seed_by_part
from colossal_core.keyed_dropout import KeyedDropoutState, KeyedLayer, Share
from colossal_tensor.group import TensorPlan, expand
from colossal_tensor.layouts import AXIS, Cutting
from colossal_tensor.sequence import SEQUENCE_DIM, is_inside_whole

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives


def install_dropout(
    model: nn.Module,
    plan: TensorPlan,
    cutting: Cutting,
    collectives: Collectives,
    blocks: Sequence[str],
    kernels: KeyedDropoutState | None = None,
) -> None:
    """Tells every keyed dropout inside a group which heads or features it has, and, where the sequence is cut, every other one of a block
    which positions. kernels: by it attention kernels that draw by themselves are seeded, with other numbers on each rank. No communication.
    """
    rank, ranks = collectives.index(AXIS), collectives.size(AXIS)
    modules = dict(model.named_modules())
    within = _cut_layers(cutting)
    for placed in cutting.placed:
        (start, stop), whole = placed.parts.of(rank)
        for pattern, dim in placed.group.dropouts:
            for name in expand(pattern, modules):
                layer = getattr(modules[name], "keyed_layer", None)
                if isinstance(layer, KeyedLayer):
                    layer.part = Share(dim, start, whole, stop - start)
                    within.add(name)
    if plan.stream is not None:
        for name, module in modules.items():
            layer = getattr(module, "keyed_layer", None)
            on_stream = any(name.startswith(f"{block}.") for block in blocks) and not is_inside_whole(plan.stream, name)
            if isinstance(layer, KeyedLayer) and on_stream and within.isdisjoint(_around(name)):
                layer.part = Share(SEQUENCE_DIM, rank, ranks)
    if kernels is not None:
        _seed_kernels(modules, cutting, kernels, rank)


def _cut_layers(cutting: Cutting) -> set[str]:
    """The layers whose weights are cut, as a whole where they are adapted: what is inside sees what has entered the group."""
    owners = (cut.parameter.rpartition(".")[0] for placed in cutting.placed for cut in placed.group.cuts)
    return {owner.removesuffix(".base_layer") for owner in owners}


def _around(name: str) -> set[str]:
    """A module and all that hold it."""
    parts = name.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts) + 1)}


def _seed_kernels(modules: dict[str, nn.Module], cutting: Cutting, state: KeyedDropoutState, rank: int) -> None:
    """Modules inside an attention group that may drop probabilities in a kernel of their own."""
    places = {placed.group.name for placed in cutting.placed if placed.group.units.kind == "heads"}
    for number, (name, module) in enumerate(modules.items()):
        if not places.isdisjoint(_around(name)) and _drops(module):
            seed_by_part(module, state, number, rank)


def _drops(module: nn.Module) -> bool:
    """Whether a module keeps a probability, of its own or in a dropout module, that it may hand to its kernel."""
    own = ("drop" in key and isinstance(value, float) and value > 0.0 for key, value in vars(module).items())
    return any(own) or any(isinstance(child, nn.Dropout) and child.p > 0.0 for child in module.children())
