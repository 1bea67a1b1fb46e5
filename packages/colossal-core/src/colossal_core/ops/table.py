"""The op table: which implementation of each op a plan uses. An object of the plan, never a global."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

OP_NAMES = (
    "rms_norm",
    "layer_norm",
    "rotary",
    "swiglu",
    "attention",
    "cross_entropy",
    "linear_cross_entropy",
    "adamw_step",
)
"""Every op, in the order in which a training step meets it. Signatures: `colossal_core.ops.reference`."""


@dataclass(frozen=True)
class OpImplementation:
    """One implementation of an op.

    op: one of `OP_NAMES`. provider: who wrote it (`reference`, `triton`). function: same signature and meaning as the
    reference. device_types, dtypes: where it works; empty: everywhere (dtypes by name: `bfloat16`). priority: the
    highest that fits is chosen.
    """

    op: str
    provider: str
    function: Callable[..., Any]
    device_types: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    priority: int = 0

    def fits(self, device_type: str, dtype: str) -> bool:
        return (not self.device_types or device_type in self.device_types) and (not self.dtypes or dtype in self.dtypes)


@dataclass(frozen=True)
class OpTable:
    """The chosen implementation of every op."""

    chosen: Mapping[str, OpImplementation]

    def __getitem__(self, op: str) -> Callable[..., Any]:
        return self.chosen[op].function

    def with_implementation(self, implementation: OpImplementation) -> OpTable:
        """This table with another implementation of one op."""
        return replace(self, chosen={**self.chosen, implementation.op: implementation})

    def providers(self) -> dict[str, str]:
        """Provider by op, as the plan prints it."""
        return {op: implementation.provider for op, implementation in self.chosen.items()}


def build_op_table(implementations: Sequence[OpImplementation], device_type: str, dtype: str) -> OpTable:
    """Chooses, for each op, the implementation of highest priority that fits; ties go to the provider first by name."""
    chosen = {}
    for op in OP_NAMES:
        fitting = [found for found in implementations if found.op == op and found.fits(device_type, dtype)]
        assert fitting, f"no implementation of {op} for {dtype} on {device_type}: the reference fits everywhere"
        chosen[op] = min(fitting, key=lambda found: (-found.priority, found.provider))
    return OpTable(chosen)
