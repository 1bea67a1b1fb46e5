"""Cross-entropy of logits, forward and backward, the gradient over the logits: as the library's step calls it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from colossal_kernels.bench.case import Call, Draw, Function, Knobs, OpBench, Shape, moved, times


def _shape(rows: int, vocabulary: int, label: str = "", **terms: float) -> Shape:
    keywords: dict[str, Any] = {"overwrite": True, **terms}
    num_bytes = (4 * Draw.counted(rows) + 2 * rows) * vocabulary
    said = "6 bytes a logit: read, read again and the gradient written; of an ignored row the gradient alone"
    return Shape(
        f"{label}{times(rows, vocabulary)} bf16",
        lambda draw: Call((draw.normal(rows, vocabulary, scale=3.0), draw.labels(rows, vocabulary)), keywords),
        {"both": moved(num_bytes, said)},
        restored=True,
    )


def _formula(
    logits: Tensor, labels: Tensor, *, overwrite: bool = False, z_loss: float = 0.0, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    del overwrite
    wide = logits.float()
    total = F.cross_entropy(wide, labels, reduction="sum", label_smoothing=smoothing)
    counted = labels != -100
    if z_loss:
        total = total + z_loss * (wide.logsumexp(-1).square() * counted).sum()
    return total, counted.sum()


def _liger() -> Function:
    from liger_kernel.ops import LigerCrossEntropyFunction

    operator: Any = LigerCrossEntropyFunction

    def call(logits: Tensor, labels: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
        terms = (keywords.get("z_loss", 0.0), keywords.get("smoothing", 0.0))
        found: Tensor = operator.apply(logits, labels, None, -100, *terms, "sum")[0]
        return found, (labels != -100).sum()

    return call


READING = (
    {"losses.rows:READ_BLOCK": (2048, 4096), "losses.rows:READ_WARPS": (4,), "losses.rows:READ_STAGES": (1, 3, 4)},
    {"losses.rows:READ_BLOCK": (8192,), "losses.rows:READ_WARPS": (8,), "losses.rows:READ_STAGES": (1, 3)},
)
WRITING = {"losses.rows:WRITE_BLOCK": (2048, 4096, 8192), "losses.rows:WRITE_WARPS": (4, 8)}
BENCH = OpBench(
    "cross_entropy",
    (
        _shape(8192, 128256),
        _shape(16384, 32768),
        _shape(8192, 50304, "z-loss and smoothing, ", z_loss=1e-4, smoothing=0.1),
        _shape(8192, 50257),
        _shape(512, 32000),
    ),
    eager=_formula,
    peers={"liger": _liger},
    knobs=tuple(Knobs(("both",), values) for values in (*READING, WRITING)),
)
