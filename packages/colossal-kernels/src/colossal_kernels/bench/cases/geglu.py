"""GeGLU in Gemma's tanh form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from colossal_core.ops import swiglu as reference
from colossal_kernels.bench.case import Call, Draw, Function, OpBench, Shape
from colossal_kernels.bench.cases.swiglu import KNOBS, gated


def tanh(shape: Shape) -> Shape:
    def call(draw: Draw) -> Call:
        return replace(shape.call(draw), keywords={"approximate": "tanh"})

    return replace(shape, label=f"{shape.label}, tanh", call=call)


def _liger() -> Function:
    from liger_kernel.ops import LigerGELUMulFunction

    operator: Any = LigerGELUMulFunction
    return lambda gate, up, **_: operator.apply(gate, up)


BENCH = OpBench(
    "geglu",
    (tanh(gated(8192, 14336)), tanh(gated(2048, 24576)), tanh(gated(1024, 6912))),
    eager=reference.geglu,
    peers={"liger": _liger},
    knobs=KNOBS,
)
