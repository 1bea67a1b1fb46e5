"""The op table: which implementation of each op a plan uses. An object of the plan, never a global."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from colossal_core.errors import Problem

OP_NAMES = (
    "rms_norm",
    "layer_norm",
    "add_rms_norm",
    "add_layer_norm",
    "rms_norm_fp8",
    "rotary",
    "swiglu",
    "geglu",
    "packed_swiglu",
    "packed_geglu",
    "route",
    "expert_order",
    "expert_permute",
    "expert_unpermute",
    "grouped_matmul",
    "experts",
    "quantize_fp8",
    "scaled_matmul",
    "attention",
    "merge_attention",
    "cross_entropy",
    "vocabulary_statistics",
    "vocabulary_gradient",
    "linear_cross_entropy",
    "quantize_blocks",
    "dequantize_blocks_sum",
    "adamw_step",
    "lion_step",
    "sgd_step",
    "symmetric_product",
)
"""Every op, in the order in which a training step meets it. Signatures: `colossal_core.ops.reference`."""


@dataclass(frozen=True)
class OpImplementation:
    """One implementation of an op.

    op: one of `OP_NAMES`. provider: who wrote it (`reference`, `triton`). function: same signature and meaning as the
    reference. device_types, dtypes: where it works; empty: everywhere (dtypes by name: `bfloat16`). priority: the
    highest that fits is chosen. under_compile: whether a model's own code uses it inside compiled blocks, where torch.compile
    would make the same of the plain code together with what stands around it: only what has been measured to be faster is.
    """

    op: str
    provider: str
    function: Callable[..., Any]
    device_types: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    priority: int = 0
    under_compile: bool = False

    def fits(self, device_type: str, dtype: str) -> bool:
        return (not self.device_types or device_type in self.device_types) and (not self.dtypes or dtype in self.dtypes)


@runtime_checkable
class DeferredOp(Protocol):
    """A function of a table that imports the real one when it is called first."""

    def resolved(self) -> Callable[..., Any]:
        """The real one: for who calls it often, or compiles what calls it."""


@dataclass(frozen=True)
class OpTable:
    """The chosen implementation of every op."""

    chosen: Mapping[str, OpImplementation]

    def __getitem__(self, op: str) -> Callable[..., Any]:
        return self.chosen[op].function

    def resolved(self, op: str) -> Callable[..., Any]:
        """As the table's item, imported now."""
        found: Any = self[op]
        function: Callable[..., Any] = found.resolved() if isinstance(found, DeferredOp) else found
        return function

    def with_implementation(self, implementation: OpImplementation) -> OpTable:
        """This table with another implementation of one op."""
        return replace(self, chosen={**self.chosen, implementation.op: implementation})

    @property
    def inside_compiled(self) -> frozenset[str]:
        """The ops whose chosen implementation is used inside compiled blocks."""
        return frozenset(op for op, found in self.chosen.items() if found.under_compile)

    def providers(self) -> dict[str, str]:
        """Provider by op, as the plan prints it."""
        return {op: implementation.provider for op, implementation in self.chosen.items()}


AUTOMATIC = "auto"
"""In the place of a provider: the implementation of highest priority that fits."""


def build_op_table(
    implementations: Sequence[OpImplementation], device_type: str, dtype: str, asked: Mapping[str, str] | None = None
) -> OpTable:
    """Chooses, for each op, the implementation of highest priority that fits; ties go to the provider first by name.

    asked: provider by op, of those that shall not be chosen so; they are used inside compiled blocks too. What cannot be (`op_problems`
    says why) is left out.
    """
    chosen = {}
    for op in OP_NAMES:
        fitting = [found for found in implementations if found.op == op and found.fits(device_type, dtype)]
        assert fitting, f"no implementation of {op} for {dtype} on {device_type}: the reference fits everywhere"
        wanted = [found for found in fitting if found.provider == (asked or {}).get(op)]
        first = min(wanted or fitting, key=lambda found: (-found.priority, found.provider))
        chosen[op] = replace(first, under_compile=True) if wanted else first
    return OpTable(chosen)


def op_problems(
    implementations: Sequence[OpImplementation], device_type: str, dtype: str, asked: Mapping[str, str]
) -> list[Problem]:
    """What is wrong with providers that are asked for by name, each at `ops.<op>`."""
    problems = []
    for op, provider in asked.items():
        field = f"ops.{op}"
        if op not in OP_NAMES:
            close = difflib.get_close_matches(op, OP_NAMES, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"there are: {', '.join(OP_NAMES)}"
            problems.append(Problem(field, "is no op", remedy, provider))
            continue
        if provider == AUTOMATIC:
            continue
        of_op = [found for found in implementations if found.op == op]
        named = [found for found in of_op if found.provider == provider]
        fitting = sorted({found.provider for found in of_op if found.fits(device_type, dtype)})
        remedy = f"use one of {', '.join([AUTOMATIC, *fitting])}"
        if not named:
            problems.append(Problem(field, "no installed package has this provider of it", remedy, provider))
        elif provider not in fitting:
            dtypes = " or ".join(dict.fromkeys(name for found in named for name in found.dtypes)) or "any dtype"
            devices = " or ".join(dict.fromkeys(name for found in named for name in found.device_types)) or "any device"
            reason = f"is for {dtypes} on {devices}, and this run computes in {dtype} on {device_type}"
            problems.append(Problem(field, reason, remedy, provider))
    return problems
