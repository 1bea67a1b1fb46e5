"""Everything that a checkpoint holds, as tensors with placements: what this rank has of it, and each of them whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch

from colossal_core.assemble import gather_full
from colossal_core.layout import ParameterLayout, Placement
from colossal_core.mesh import BASE_AXES, WORLD, MeshLayout
from colossal_core.strategy import RegisteredTensor

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.optimizer_state import StateTensor
    from colossal_core.step import StepEngine


def registered_tensors(engine: StepEngine, optimizer_states: Iterable[StateTensor]) -> list[RegisteredTensor]:
    """Masters, persistent buffers, optimizer states (as given), what belongs to the step, and what strategies registered.

    Masters and what is kept for each of them are there where the parameter is. What belongs to no parameter is the same on every rank.
    """
    mesh = engine.plan.mesh
    shards = engine.state.shards
    found = [
        RegisteredTensor("parameter", name, shard.master.detach(), shard.layout.state) for name, shard in shards.items()
    ]
    found += buffers_of(engine)
    by_master = {id(shard.master): shard for shard in shards.values()}
    for state in optimizer_states:
        if state.master is None:
            name, placement = "optimizer", same_everywhere(tuple(state.tensor.shape), mesh)
        else:
            shard = by_master[id(state.master)]
            name, placement = shard.layout.full_name, shard.layout.state
            if state.tensor.shape != shard.master.shape or state.tensor.dim() == 0:
                placement = placement.as_replicated(tuple(state.tensor.shape))
        found.append(RegisteredTensor(state.kind, name, state.tensor, state.placement or placement))
    counted = {"step.skipped_steps": engine.skipped_steps}
    if engine.loss_scale is not None:
        counted["loss_scale.scale"] = engine.loss_scale.scale
        counted["loss_scale.good_steps"] = engine.loss_scale.good_steps
    found += [RegisteredTensor(kind, "step", tensor, same_everywhere((), mesh)) for kind, tensor in counted.items()]
    return found + list(engine.context.tensors)


def same_everywhere(shape: tuple[int, ...], mesh: MeshLayout) -> Placement:
    """Of what every rank has whole; the first one owns it."""
    return Placement(shape, replicated=tuple(axis for axis in BASE_AXES if mesh.size(axis) > 1))


def buffers_of(engine: StepEngine) -> list[RegisteredTensor]:
    """The model's persistent buffers. Every rank has all of them; in a pipeline those count that lie where a buffer's module runs, which is
    where the parameters beside it are: running statistics change only there.
    """
    layouts, mesh = engine.plan.layouts.values(), engine.plan.mesh
    units: dict[str, list[ParameterLayout]] = {}
    for layout in layouts:
        units.setdefault(layout.block, []).append(layout)
    found = []
    for name, buffer in engine.model.state_dict(keep_vars=True).items():
        if isinstance(buffer, torch.nn.Parameter) or not isinstance(buffer, torch.Tensor):
            continue
        placement = same_everywhere(tuple(buffer.shape), mesh)
        beside = _unit_around(name, units)
        # Of a unit that several stages read (a tied embedding), the stage that has the rest of it runs its module.
        present = min((layout.compute.present for layout in beside), key=_num_held, default=())
        if present:
            left = tuple(axis for axis in placement.replicated if axis not in dict(present))
            placement = replace(placement, replicated=left, present=present)
        found.append(RegisteredTensor("buffer", name, buffer, placement))
    return found


def _unit_around(name: str, units: Mapping[str, list[ParameterLayout]]) -> list[ParameterLayout]:
    """The parameters of the innermost unit whose module holds the buffer; of the whole model's own parameters only for its own buffers."""
    module = name.rpartition(".")[0]
    if not module:
        return units.get("", [])
    while module:
        if module in units:
            return units[module]
        module = module.rpartition(".")[0]
    return []


def _num_held(present: tuple[tuple[str, tuple[int, ...]], ...]) -> int:
    return sum(len(held) for _, held in present)


def full_tensors(
    tensors: Iterable[RegisteredTensor], collectives: Collectives
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, full name, whole tensor) of what any rank has, the same on all of them, which call it together.

    Communication: that of `gather_full` for each; in a pipeline, first one gather of bytes over all ranks: names, dtypes and placements.
    """
    here = {(tensor.kind, tensor.full_name): tensor for tensor in tensors}
    known = {key: (tensor.local.dtype, tensor.placement) for key, tensor in here.items()}
    if collectives.mesh.size("pp") > 1:
        known = _known_to_any(known, collectives)
    for (kind, name), (dtype, placement) in known.items():
        tensor = here.get((kind, name))
        local = torch.empty(0, dtype=dtype) if tensor is None else tensor.local
        yield kind, name, gather_full(local.to(collectives.device), placement, collectives)


_Known = dict[tuple[str, str], tuple[torch.dtype, Placement]]


def _known_to_any(known: _Known, collectives: Collectives) -> _Known:
    from pydantic import TypeAdapter

    from colossal_core.checkpoint.dtypes import dtype_name, torch_dtype

    read = TypeAdapter(Placement).validate_python
    own = [(kind, name, dtype_name(dtype), asdict(placement)) for (kind, name), (dtype, placement) in known.items()]
    found: _Known = {}
    for text in collectives.gather_bytes(json.dumps(own).encode(), WORLD, tag="full tensor"):
        for kind, name, dtype, placement in json.loads(text):
            found.setdefault((kind, name), (torch_dtype(dtype), read(placement)))
    return found
