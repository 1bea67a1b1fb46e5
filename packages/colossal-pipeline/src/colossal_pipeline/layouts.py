"""On which stages each parameter lies. One that several ranks read is on all of them, and its gradient is summed over them once a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from colossal_core.mesh import SharingSet

if TYPE_CHECKING:
    from colossal_core.flow import Flow
    from colossal_core.layout import ParameterLayout, Placement
    from colossal_core.mesh import MeshLayout
    from colossal_pipeline.cutting import Cutting

AXIS = "pp"


@dataclass(frozen=True)
class Staged:
    """layouts: of every parameter. mesh: with the sets of ranks that share one. stage_units: of each stage the units that it reads."""

    layouts: Mapping[str, ParameterLayout]
    mesh: MeshLayout
    stage_units: tuple[tuple[str, ...], ...]


def staged_layouts(
    layouts: Mapping[str, ParameterLayout], flow: Flow, cutting: Cutting, stage_ranks: Sequence[int], mesh: MeshLayout
) -> Staged:
    """Every parameter on the ranks whose stages read it; one that nothing reads on the first."""
    stages = {
        name: sorted({cutting.stage_of(position) for position in positions}) or [0] for name, positions in flow.read
    }
    ranks = {name: tuple(sorted({stage_ranks[stage] for stage in found})) for name, found in stages.items()}
    for shared in sorted({held for held in ranks.values() if len(held) > 1}):
        mesh = mesh.with_sharing(SharingSet(_set_name(shared), shared))
    changed = {
        name: replace(
            layout,
            compute=_held(layout.compute, ranks[name], trainable=layout.trainable),
            state=_held(layout.state, ranks[name], trainable=layout.trainable),
        )
        for name, layout in layouts.items()
    }
    units: list[dict[str, None]] = [{} for _ in range(cutting.num_stages)]
    for name, layout in layouts.items():
        for stage in stages[name]:
            units[stage][layout.block] = None
    return Staged(changed, mesh, tuple(tuple(found) for found in units))


def _held(placement: Placement, ranks: tuple[int, ...], *, trainable: bool) -> Placement:
    """A placement on some ranks of `pp`. Where several hold it, each has a part of its gradient's sum; what is frozen has none."""
    shared = (_set_name(ranks),) if len(ranks) > 1 and trainable else ()
    return replace(
        placement,
        replicated=tuple(axis for axis in placement.replicated if axis != AXIS),
        partial=(*shared, *placement.partial),
        present=((AXIS, ranks),),
    )


def _set_name(ranks: Sequence[int]) -> str:
    return "shared:" + "+".join(map(str, ranks))
