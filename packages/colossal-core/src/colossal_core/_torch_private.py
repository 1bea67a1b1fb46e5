"""Every name of torch that is not public, and the versions on which each was tried. Nothing else in this package imports one.

All were tried on torch 2.13.0 (CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch._ops import OpOverload
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

__all__ = [
    "OpOverload",
    "TorchDispatchMode",
    "call_node",
    "hidden_from_dynamo",
    "is_view_op",
    "num_gradients_in",
    "packet_of",
    "raise_recompile_limit",
    "selective_contexts",
]


def hidden_from_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `torch.compiler.disable`, which imports Dynamo (0.8 s) where it is written; this one where the function is first called."""
    found: Callable[..., Any] = _disable_dynamo(function)
    return found


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


def selective_contexts(
    policy: Callable[..., Any] | list[OpOverload],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Torch's contexts for the first run of a selectively checkpointed function and for the second. Public, but without types."""
    first, second = create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
    return first, second


def num_gradients_in(node: Node) -> int:
    """How many gradients a node of autograd's graph takes: one for each output of the function that it is the derivative of."""
    return len(node._input_metadata)


def call_node(node: Node, gradients: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    """Runs one node of autograd's graph by itself: the gradients that it passes on, one for each of `next_functions`.

    As autograd does between nodes, each is brought to the shape and dtype that the next node takes (a bias was broadcast).
    """
    callable_node: Any = node
    results = callable_node(*gradients)
    passed = results if isinstance(results, tuple) else (results,)
    return tuple(
        None if gradient is None or child is None else _fitted(gradient, child._input_metadata[output])
        for gradient, (child, output) in zip(passed, node.next_functions, strict=True)
    )


def _fitted(gradient: torch.Tensor, metadata: Any) -> torch.Tensor:
    return gradient.sum_to_size(metadata.shape).to(metadata.dtype)
