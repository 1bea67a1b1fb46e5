"""Inputs of each op for `OpSuite`: ordinary and odd shapes, empty ones, and every optional argument, in any floating dtype.

Letters: B sequences, H query heads, K key-value heads, L queries, S keys, D features, V vocabulary, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from colossal_core.testing.op_cases import attention, experts, gates, losses, low_precision, norms, optimizers
from colossal_core.testing.op_cases.case import Cases, OpCase

__all__ = ["OpCase", "op_cases"]

FAMILIES = (norms, gates, attention, experts, losses, low_precision, optimizers)


def op_cases(op: str, dtype: torch.dtype) -> tuple[OpCase, ...]:
    """The cases of an op, the same numbers each time (rounded to `dtype`)."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return tuple(_cases()[op](normal, generator))


def _cases() -> Mapping[str, Cases]:
    return {op: cases for family in FAMILIES for op, cases in family.CASES.items()}
