"""Partial attention results of a ring brought together: two parts at once, and one step of a ring in place."""

from __future__ import annotations

import torch

from colossal_core.ops import attention as reference
from colossal_kernels.bench.case import Call, Draw, Knobs, OpBench, Shape, moved


def _shape(length: int, parts: int, *, in_place: bool = False) -> Shape:
    heads, width = 32, 128
    elements = length * heads * width

    def call(draw: Draw) -> Call:
        first = torch.float32 if in_place else torch.bfloat16
        outputs = [
            draw.normal(1, heads, length, width, dtype=torch.bfloat16 if index else first, grad=not in_place)
            for index in range(parts)
        ]
        lses = [draw.normal(1, heads, length, dtype=torch.float32, grad=not in_place) for _ in range(parts)]
        return Call((outputs, lses), {"overwrite": True} if in_place else {})

    label = f"{parts} parts of 1x{heads}x{length}x{width}"
    if in_place:
        least = moved((2 + 8) * elements, "the sum in fp32 read and written, the other part in bf16 read")
        return Shape(f"{label} in place, fp32 and bf16", call, {"forward": least}, restored=True)
    return Shape(
        f"{label} bf16",
        call,
        {
            "forward": moved(2 * (parts + 1) * elements, "(P + 1) E: parts read, one written"),
            "backward": moved(2 * (2 * parts + 1) * elements, "(2 P + 1) E: parts and gradient read, P written"),
        },
    )


BENCH = OpBench(
    "merge_attention",
    (_shape(8192, 2), _shape(8192, 2, in_place=True), _shape(4096, 8), _shape(512, 2)),
    eager=reference.merge_attention,
    knobs=(
        Knobs(
            ("forward", "backward"),
            {"attention.merge:VECTORS": (2, 4, 8), "attention.merge:WARPS": (1, 2, 4)},
        ),
    ),
)
