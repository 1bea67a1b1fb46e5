"""Output projection and cross-entropy in one, forward and backward."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from colossal_kernels.bench.case import GIB, Call, Function, Knobs, OpBench, Shape, multiplied, times


def _shape(rows: int, features: int, vocabulary: int, goal_ms: float | None = None) -> Shape:
    flops = 6 * rows * features * vocabulary
    goal_bytes = 3 * GIB // 2 if goal_ms is not None else None
    return Shape(
        f"{times(rows, features)} -> {vocabulary} bf16",
        lambda draw: Call(
            (
                draw.normal(rows, features),
                draw.normal(vocabulary, features, scale=features**-0.5),
                draw.labels(rows, vocabulary),
            )
        ),
        {"both": multiplied(flops, "6 N D V: logits and two gradients, none of them twice", goal_ms, goal_bytes)},
    )


def _formula(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def _liger() -> Function:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    operator: Any = LigerFusedLinearCrossEntropyFunction
    return lambda hidden, weight, labels: operator.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum")[0]


def _cce() -> Function:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, reduction="sum")


def _torch() -> Function:
    """torch 2.13 and later."""
    found: Any = getattr(F, "linear_cross_entropy", None)
    if found is None:
        message = "this torch has no linear_cross_entropy"
        raise ImportError(message)
    return lambda hidden, weight, labels: found(hidden, weight, labels, reduction="sum", ignore_index=-100)


IN_PLACE, CHUNKS = "losses.in_place:in_place_config", "losses.linear_cross_entropy:chunks_of"
BENCH = OpBench(
    "linear_cross_entropy",
    (_shape(8192, 4096, 128256, 37.6), _shape(16384, 2048, 32768), _shape(2048, 2048, 50304)),
    eager=_formula,
    peers={"liger": _liger, "cce": _cce, "torch_chunked": _torch},
    knobs=(
        Knobs(("both",), {f"{IN_PLACE}.block": (8192, 16384), f"{IN_PLACE}.warps": (16, 32)}),
        Knobs(("both",), {f"{IN_PLACE}.block": (4096,), f"{IN_PLACE}.warps": (8,), f"{IN_PLACE}.stages": (4,)}),
        Knobs(("both",), {f"{CHUNKS}.rows": (1024, 1792, 2048), f"{CHUNKS}.parts": (1,)}),
        Knobs(("both",), {f"{CHUNKS}.rows": (1536,), f"{CHUNKS}.parts": (1, 2)}),
    ),
)
