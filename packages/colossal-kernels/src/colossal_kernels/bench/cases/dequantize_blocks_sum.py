"""What arrives from several ranks in 8 bits, as one sum."""

from __future__ import annotations

import torch

from colossal_core.ops import low_precision as reference
from colossal_kernels.bench.case import Call, Draw, Knobs, OpBench, Shape, moved, name_of


def _shape(parts: int, elements: int, source: torch.dtype) -> Shape:
    def call(draw: Draw) -> Call:
        made = [
            reference.quantize_blocks(draw.normal(elements, dtype=torch.float32, grad=False), dtype=source)
            for _ in range(parts)
        ]
        codes, scales = (torch.stack(tensors) for tensors in zip(*made, strict=True))
        return Call((codes, scales))

    return Shape(
        f"{parts} parts of {elements >> 20} Mi {name_of(source)} -> fp32",
        call,
        {"forward": moved((parts + 4) * elements, "P bytes an element read, 4 written")},
    )


BENCH = OpBench(
    "dequantize_blocks_sum",
    (_shape(4, 1 << 25, torch.int8), _shape(8, 1 << 24, torch.float8_e4m3fn), _shape(2, 1 << 20, torch.int8)),
    eager=reference.dequantize_blocks_sum,
    knobs=(
        Knobs(("forward",), {"low_precision.blocks:SUM_TILES": (1, 2, 4), "low_precision.blocks:SUM_WARPS": (4, 8)}),
    ),
)
