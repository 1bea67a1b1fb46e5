"""What a traced forward pass needs to know of torch's operators, by name: which are matrix products, which only move elements."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from colossal_core._torch_private import OpOverload

OPERANDS: Mapping[str, tuple[int, int]] = {
    "mm": (0, 1),
    "addmm": (1, 2),
    "bmm": (0, 1),
    "baddbmm": (1, 2),
    "_grouped_mm": (0, 1),
    "mv": (0, 1),
}
"""Which arguments of an operator are the factors of a matrix product."""

_COPIES = frozenset(
    (
        "clone",
        "_to_copy",
        "copy",
        "copy_",
        "cat",
        "stack",
        "slice_scatter",
        "select_scatter",
        "index",
        "index_put",
        "index_put_",
        "index_select",
        "index_add",
        "index_add_",
        "gather",
        "scatter",
        "scatter_add",
        "scatter_add_",
        "constant_pad_nd",
        "repeat",
        "repeat_interleave",
        "_unsafe_view",
        "reshape",
        "contiguous",
        "split",
        "split_with_sizes",
        "chunk",
        "roll",
        "flip",
        "masked_fill",
        "masked_fill_",
    )
)
"""Operators that only move elements."""


FACTORIES = frozenset(
    (
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_empty_strided",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "bernoulli",
    )
)
"""Operators that read only the size and kind of what they are given."""


def is_one_by_one(func: OpOverload) -> bool:
    """Whether an operator leaves features apart: it works element by element, or moves elements."""
    name = func.overloadpacket.__name__
    return torch.Tag.pointwise in func.tags or bool(func.is_view) or name in _COPIES


def writes_its_first(func: OpOverload) -> bool:
    """Whether an operator writes into its first argument."""
    arguments = func._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write
