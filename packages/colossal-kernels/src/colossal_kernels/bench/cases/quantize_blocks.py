"""A tensor in 8 bits with a scale for each block, to be sent."""

from __future__ import annotations

import torch

from colossal_core.ops import low_precision as reference
from colossal_kernels.bench.case import Call, Knobs, OpBench, Shape, moved, name_of


def _shape(elements: int, source: torch.dtype, target: torch.dtype) -> Shape:
    return Shape(
        f"{elements >> 20} Mi {name_of(source)} -> {name_of(target)}",
        lambda draw: Call((draw.normal(elements, dtype=source, grad=False),), {"dtype": target}),
        {"forward": moved((source.itemsize + 1) * elements, "the tensor read, one byte an element written")},
    )


BENCH = OpBench(
    "quantize_blocks",
    (
        _shape(1 << 26, torch.bfloat16, torch.int8),
        _shape(1 << 26, torch.float32, torch.float8_e4m3fn),
        _shape(1 << 20, torch.bfloat16, torch.int8),
    ),
    eager=reference.quantize_blocks,
    compared="float32",
    knobs=(
        Knobs(
            ("forward",),
            {"low_precision.blocks:TILE_ELEMENTS": (2048, 4096, 8192), "low_precision.blocks:TILE_WARPS": (4, 8)},
        ),
    ),
)
