"""What the strategy writes into a plan, and reads from it again where it is carried out and where its cost is counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from colossal_tensor.group import TensorPlan, expand
from colossal_tensor.layouts import Cutting

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.plan import Plan

NAME = "tensor"
_PRODUCTS = ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear")
"""Classes of which `fused.is_product` says that they multiply and nothing else."""


@dataclass(frozen=True)
class Decided:
    """plan, cutting: what `apply` carries out. width: features of the activation stream. products: modules at the border of a group that
    are plain products, so that one operator gathers or scatters and multiplies where the sequence is cut.
    """

    plan: TensorPlan
    cutting: Cutting
    width: int = 0
    products: tuple[str, ...] = ()


def decide(plan: TensorPlan, cutting: Cutting, anatomy: ModelAnatomy) -> Decided:
    """Everything of a plan that others ask for later."""
    classes = {fact.name: fact.class_name for fact in anatomy.modules}
    patterns = dict.fromkeys(_at_borders(cutting))
    names = dict.fromkeys(name for pattern in patterns for name in expand(pattern, classes))
    agreed = replace(plan, notes=())  # which rank of a failed proof raises first may differ from process to process
    return Decided(agreed, cutting, _width(anatomy), tuple(name for name in names if classes[name] in _PRODUCTS))


def _at_borders(cutting: Cutting) -> Iterable[str]:
    for placed in cutting.placed:
        for entry in placed.group.entries:
            yield from entry.columns
        for exit_ in placed.group.exits:
            yield exit_.module


def _width(anatomy: ModelAnatomy) -> int:
    """Of the table of embeddings, else what the model says of itself."""
    shapes = {name: fact.shape for fact in anatomy.parameters for name in fact.names}
    tables = [shapes[f"{name}.weight"] for name in anatomy.embeddings if f"{name}.weight" in shapes]
    return anatomy.hidden_size or (tables[0][-1] if tables else 0)


def written(found: Decided) -> dict[str, object]:
    """As JSON values, for `Plan.data`."""
    from pydantic import TypeAdapter

    data: dict[str, object] = TypeAdapter(Decided).dump_python(found, mode="json")
    return data


def read(plan: Plan) -> Decided:
    """What `written` has left in a plan."""
    from pydantic import TypeAdapter

    return TypeAdapter(Decided).validate_python(plan.data[NAME])
