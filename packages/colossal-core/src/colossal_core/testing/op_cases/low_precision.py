"""Operations in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from colossal_core.ops import low_precision as reference
from colossal_core.ops.low_precision import Granularity, Recipe
from colossal_core.testing.op_cases.case import Cases, Normal, OpCase

_FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def _quantize_fp8(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for granularity in Granularity:
        both = {"transposed": True}
        yield OpCase(f"{granularity}", (normal(9, 24), granularity))
        yield OpCase(f"{granularity}, transposed too", (normal(11, 7), granularity), both)
        yield OpCase(f"{granularity}, several blocks", (normal(129, 131), granularity), both)
        yield OpCase(f"{granularity}, one number", (normal(1, 1), granularity), both)
        yield OpCase(f"{granularity}, zeros", (torch.zeros_like(normal(3, 5)), granularity), both)
        yield OpCase(f"{granularity}, not contiguous", (normal(24, 9).t(), granularity))
        yield OpCase(f"{granularity}, e5m2", (normal(5, 16), granularity), {"dtype": torch.float8_e5m2})
    yield OpCase("empty", (normal(0, 8), Granularity.ROW))


def _scaled_matmul(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for recipe in Recipe:
        for name, (rows, columns, width) in (("", (32, 48, 128)), (", odd", (5, 3, 130))):
            left, right = recipe.granularities()
            a = reference.quantize_fp8(normal(rows, width), left)
            b = reference.quantize_fp8(normal(columns, width), right)
            yield OpCase(f"{recipe}{name}", (*a, *b, recipe))
    a = reference.quantize_fp8(normal(16, 32), dtype=torch.float8_e5m2)
    yield OpCase("a gradient", (*a, *reference.quantize_fp8(normal(16, 32))), {"dtype": torch.float32})


def _quantize_blocks(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for dtype in (torch.int8, *_FORMATS):
        name = str(dtype).removeprefix("torch.")
        yield OpCase(name, (normal(3, 256),), {"dtype": dtype})
        yield OpCase(f"{name}, odd", (normal(7, 77),), {"dtype": dtype, "block": 128})
    yield OpCase("zeros", (torch.zeros_like(normal(5)),))
    yield OpCase("not contiguous", (normal(12, 5).t(),), {"block": 16})
    yield OpCase("empty", (normal(0),))


def _dequantize_blocks_sum(normal: Normal, generator: torch.Generator) -> Iterator[OpCase]:
    del generator
    for name, parts, size, block, dtype in (
        ("two parts", 2, 512, 256, torch.int8),
        ("odd", 3, 77, 32, torch.int8),
        ("one part", 1, 5, 256, torch.int8),
        ("fp8", 2, 300, 128, torch.float8_e4m3fn),
        ("empty", 2, 0, 256, torch.int8),
    ):
        made = [reference.quantize_blocks(normal(size), block=block, dtype=dtype) for _ in range(parts)]
        codes, scales = (torch.stack(tensors) for tensors in zip(*made, strict=True))
        yield OpCase(name, (codes, scales), {"block": block})


CASES: Mapping[str, Cases] = {
    "quantize_fp8": _quantize_fp8,
    "scaled_matmul": _scaled_matmul,
    "quantize_blocks": _quantize_blocks,
    "dequantize_blocks_sum": _dequantize_blocks_sum,
}
