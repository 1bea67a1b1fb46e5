"""Choices sorted by expert, without the host."""

from __future__ import annotations

from colossal_core.ops import experts as reference
from colossal_kernels.bench.case import Call, Knobs, OpBench, Shape, moved


def _shape(tokens: int, num_experts: int, top_k: int, multiple: int = 1) -> Shape:
    choices = tokens * top_k
    return Shape(
        f"{tokens} tokens top {top_k} of {num_experts}{f', filled up to {multiple}' if multiple > 1 else ''}",
        lambda draw: Call((draw.choices(tokens, num_experts, top_k), num_experts), {"multiple": multiple}),
        {"forward": moved(16 * choices, "16 bytes a choice: read in 8, order and inverse written in 4 each")},
    )


BENCH = OpBench(
    "expert_order",
    (_shape(8192, 128, 8), _shape(32768, 128, 8, 16), _shape(4096, 8, 2)),
    eager=reference.expert_order,
    knobs=(Knobs(("forward",), {"experts.order:BLOCK": (64, 128, 256), "experts.order:SCAN": (512, 1024, 2048)}),),
)
