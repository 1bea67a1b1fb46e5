"""The gradient of a rank's own columns of the logits, over them: the other half of vocabulary-parallel cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colossal_core.ops import vocabulary as reference
from colossal_core.ops.cross_entropy import LossTerms
from colossal_core.ops.vocabulary import Words
from colossal_kernels.bench.case import Call, Draw, Knobs, OpBench, Shape, moved, times
from colossal_kernels.bench.cases.cross_entropy import WRITING


def _shape(rows: int, vocabulary: int, ranks: int) -> Shape:
    columns = vocabulary // ranks
    words = Words(columns, 2 * columns, vocabulary)

    def call(draw: Draw) -> Call:
        logits = draw.normal(rows, columns, scale=3.0, grad=False)
        lse = 16.0 + draw.normal(rows, dtype=torch.float32, grad=False)
        scale = torch.full((), 0.5, device=draw.device)
        arguments = (scale, logits, draw.labels(rows, vocabulary), lse, words, LossTerms())
        return Call(arguments, {"overwrite": True})

    label = f"{times(rows, columns)} of {vocabulary} bf16, in place"
    num_bytes = 2 * (Draw.counted(rows) + rows) * columns
    least = moved(num_bytes, "4 bytes a logit: read, its gradient written; of an ignored row the gradient alone")
    return Shape(label, call, {"forward": least}, restored=True)


def _formula(*arguments: Any, overwrite: bool = False) -> Tensor:
    del overwrite
    return reference.row_gradients(*arguments)


BENCH = OpBench(
    "vocabulary_gradient",
    (_shape(8192, 128256, 2), _shape(16384, 128256, 4), _shape(2048, 32768, 4)),
    eager=reference.vocabulary_gradient,
    formula=_formula,
    knobs=(Knobs(("forward",), WRITING),),
)
