"""What a rank finds out about its own columns of the logits before ranks talk: half of vocabulary-parallel cross-entropy."""

from __future__ import annotations

from colossal_core.ops import vocabulary as reference
from colossal_core.ops.cross_entropy import LossTerms
from colossal_core.ops.vocabulary import Words
from colossal_kernels.bench.case import Call, Draw, Knobs, OpBench, Shape, moved, times
from colossal_kernels.bench.cases.cross_entropy import READING


def _shape(rows: int, vocabulary: int, ranks: int) -> Shape:
    columns = vocabulary // ranks
    words = Words(columns, 2 * columns, vocabulary)

    def call(draw: Draw) -> Call:
        logits = draw.normal(rows, columns, scale=3.0, grad=False)
        return Call((logits, draw.labels(rows, vocabulary), words, LossTerms()))

    label = f"{times(rows, columns)} of {vocabulary} bf16"
    least = moved(2 * Draw.counted(rows) * columns, "2 bytes a logit: read, but for ignored rows")
    return Shape(label, call, {"forward": least})


BENCH = OpBench(
    "vocabulary_statistics",
    (_shape(8192, 128256, 2), _shape(16384, 128256, 4), _shape(2048, 32768, 4)),
    eager=reference.vocabulary_statistics,
    formula=reference.row_statistics,
    knobs=tuple(Knobs(("forward",), values) for values in READING),
)
