"""The step of gradient descent with momentum in mixed precision."""

from __future__ import annotations

from collections.abc import Sequence

from colossal_core.ops import sgd as reference
from colossal_core.ops.sgd import SGDSettings
from colossal_kernels.bench.case import OpBench, Shape, moved
from colossal_kernels.bench.cases.adamw_step import KNOBS, elements_of, llama_like, step_shape

SETTINGS = SGDSettings(lr=1e-3, momentum=0.9, weight_decay=0.1)


def _shape(label: str, shapes: Sequence[tuple[int, ...]]) -> Shape:
    least = moved(20 * elements_of(shapes), "20 bytes an element: 2 + 8 + 8 + 2")
    return step_shape(label, shapes, 1, least, {"settings": SETTINGS})


BENCH = OpBench(
    "sgd_step",
    (
        _shape("flat", ((1 << 28,),)),
        _shape("72 tensors", llama_like(8, 2048, 5632)),
        _shape("90 tensors", llama_like(10, 512, 1408)),
    ),
    eager=reference.sgd_step,
    knobs=KNOBS,
)
