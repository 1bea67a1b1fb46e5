"""Where a model is cut into stages: at which blocks, what crosses there, and which parameters each stage reads. Pure data.

Positions are those of `colossal_core.flow`: before block call k stands 2k, the call itself is 2k + 1, what runs after the last of n is 2n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.flow import Flow
    from colossal_core.plan import Plan

NAME = "pipeline"


@dataclass(frozen=True)
class Crossing:
    """One tensor that crosses a border between stages: the `output`-th (depth first) of what the `call`-th call of a unit returns, made at
    position `made`.
    """

    unit: str
    call: int
    output: int
    made: int


@dataclass(frozen=True)
class Cutting:
    """The stages of a model.

    starts: of each stage its first block call. num_blocks: block calls of the whole model. units: each block and each outermost module with
    parameters outside the blocks, with the positions of its calls. crossing: what crosses into each stage; nothing into the first. width:
    features of what flows between blocks, 0 where they are not known.
    """

    starts: tuple[int, ...]
    num_blocks: int
    units: tuple[tuple[str, tuple[int, ...]], ...]
    crossing: tuple[tuple[Crossing, ...], ...]
    width: int = 0

    @property
    def num_stages(self) -> int:
        return len(self.starts)

    @property
    def counts(self) -> tuple[int, ...]:
        """Block calls of each stage."""
        ends = (*self.starts[1:], self.num_blocks)
        return tuple(end - start for start, end in zip(self.starts, ends, strict=True))

    def stage_of(self, position: int) -> int:
        """The stage in which a position runs: what stands between two blocks belongs to the latter, what follows the last to the last."""
        return max(stage for stage, start in enumerate(self.starts) if 2 * start <= position or stage == 0)

    def positions(self, stage: int) -> range:
        """The positions that a stage runs."""
        first = 2 * self.starts[stage]
        is_last = stage + 1 == self.num_stages
        return range(first, 2 * self.num_blocks + 1 if is_last else 2 * self.starts[stage + 1])


def cut(flow: Flow, starts: Sequence[int]) -> Cutting:
    """Stages that begin at the block calls `starts`, the first of which is 0."""
    calls: dict[str, list[int]] = {}
    for index, block in enumerate(flow.blocks):
        calls.setdefault(block, []).append(2 * index + 1)
    units = [(name, tuple(positions)) for name, positions in calls.items()] + list(flow.outside)
    crossing = tuple(
        tuple(
            Crossing(one.unit, one.call, one.output, one.made)
            for one in flow.passed
            if one.made < 2 * start <= one.used
        )
        for start in starts
    )
    return Cutting(tuple(starts), len(flow.blocks), tuple(units), crossing)


def stream_width(anatomy: ModelAnatomy) -> int:
    """Features of what flows between blocks: the model's own word for it, else the width of its first table of embeddings; 0: not known."""
    if anatomy.hidden_size is not None:
        return anatomy.hidden_size
    tables = {f"{name}.weight" for name in anatomy.embeddings}
    return next((fact.shape[-1] for fact in anatomy.parameters if tables.intersection(fact.names)), 0)


def balanced_starts(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Cuts a row of blocks so that the most expensive stage is as cheap as it can be, and of such cuts one with even stages.

    costs: of each block, with what runs before it; the last one's with what runs after it. Every stage gets at least one block.
    """
    count = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[k][i]: (largest stage, sum of squares) of the first i blocks in k stages, and where the last of them begins
    best = [{0: ((0.0, 0.0), 0)}]
    for stage in range(1, num_stages + 1):
        row = {}
        for end in range(stage, count - (num_stages - stage) + 1):
            choices = []
            for start, ((largest, squares), _) in best[-1].items():
                if start < end:
                    cost = sums[end] - sums[start]
                    choices.append(((max(largest, cost), squares + cost * cost), start))
            row[end] = min(choices)
        best.append(row)
    starts, end = [], count
    for stage in range(num_stages, 0, -1):
        end = best[stage][end][1]
        starts.append(end)
    return tuple(reversed(starts))


def block_costs(anatomy: ModelAnatomy, flow: Flow) -> list[float]:
    """The cost of each block call in elements that every token is multiplied with: parameters of two dimensions or more, read in the block
    or in front of it, and for the last one behind it. Looking up a table costs nothing, unless it is the head too.
    """
    tables = set(anatomy.embeddings)
    elements = {fact.full_name: _multiplied(fact.shape) for fact in anatomy.parameters}
    names = {name: fact.names for fact in anatomy.parameters for name in (fact.full_name,)}
    costs = [0.0] * len(flow.blocks)
    last = len(flow.blocks) - 1
    for name, positions in flow.read:
        is_table = any(alias.rpartition(".")[0] in tables for alias in names[name])
        for position in positions:
            if is_table and position != 2 * len(flow.blocks):
                continue
            costs[min(position // 2, last)] += elements[name]
    return costs


def _multiplied(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total if len(shape) > 1 else 0


def written(found: Cutting) -> dict[str, object]:
    """As JSON values, for `Plan.data`."""
    from pydantic import TypeAdapter

    data: dict[str, object] = TypeAdapter(Cutting).dump_python(found, mode="json")
    return data


def read(plan: Plan) -> Cutting:
    """What `written` has left in a plan."""
    from pydantic import TypeAdapter

    return TypeAdapter(Cutting).validate_python(plan.data[NAME])
