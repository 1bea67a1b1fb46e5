"""Every name of torch that is not public, and the versions on which each was tried. Nothing else in this package imports one.

All were tried on torch 2.13.0 (CPU); `torch._dynamo.config.recompile_limit` is also there in 2.11.0.
"""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload


def raise_recompile_limit(num_blocks: int) -> None:
    """Lets one piece of code be compiled once for each of `num_blocks` blocks, beside the versions for other shapes that torch allows.

    Blocks of one class share their code, and torch would otherwise fall back to eager at the ninth. Process-wide, and only ever raised.
    """
    import torch._dynamo.config as dynamo_config

    settings: Any = dynamo_config
    settings.recompile_limit = max(settings.recompile_limit, num_blocks + 8)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 32 * (num_blocks + 8))


def is_view_op(op: OpOverload) -> bool:
    """Whether the operator returns its input's storage or writes into it, by its schema."""
    schema = op._schema
    return any(returned.alias_info is not None for returned in schema.returns)


def packet_of(op: OpOverload) -> Any:
    """The operator without its overload (`aten.mm` of `aten.mm.default`), by which torch's flop formulas are kept."""
    return op._overloadpacket
