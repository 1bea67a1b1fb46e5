"""The products of Muon's iteration: a Gram matrix, and a polynomial of one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from colossal_core.ops import symmetric_product as reference
from colossal_kernels.bench.case import Call, Draw, Knobs, OpBench, Shape, multiplied, times


def _shape(batch: int, rows: int, columns: int, *, added: bool = False) -> Shape:
    def call(draw: Draw) -> Call:
        a = draw.normal(batch, rows, columns, scale=columns**-0.5, grad=False)
        if not added:
            return Call((a,))
        symmetric = (a + a.mT) / 2
        return Call((symmetric, None, symmetric.clone()), {"alpha": 2.0, "beta": -4.5})

    flops = batch * rows * (rows + 1) * columns
    label = f"{batch} of {times(rows, columns)} bf16{', added' if added else ''}"
    return Shape(label, call, {"forward": multiplied(flops, "B M (M + 1) K: one half, and the diagonal")})


def _torch(*arguments: Any, **keywords: Any) -> Tensor:
    return reference.symmetric_product(*arguments, **keywords)


BENCH = OpBench(
    "symmetric_product",
    (
        _shape(8, 4096, 14336),
        _shape(8, 2048, 2048, added=True),
        _shape(8, 4096, 4096, added=True),
        _shape(8, 2048, 5632),
    ),
    eager=_torch,
    knobs=(
        Knobs(
            ("forward",),
            {
                "optimizers.symmetric_product:DEPTH": (32, 64, 128),
                "optimizers.symmetric_product:NUM_WARPS": (4, 8),
                "optimizers.symmetric_product:NUM_STAGES": (3, 4, 5),
            },
        ),
    ),
)
