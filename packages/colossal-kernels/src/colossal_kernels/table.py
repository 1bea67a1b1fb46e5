"""Every implementation that this package announces, and where it fits. The modules are imported when an op is called first."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from colossal_core.ops import OpImplementation
from colossal_kernels.cpu.built import compiler
from colossal_kernels.interpreting import interpreted

FLOATS = ("float32", "bfloat16", "float16")
"""Kernels compute in float32: float64 stays with the references."""


@dataclass(frozen=True)
class Entry:
    """op: of core's registry. module: of this package, which has a function of the op's name. dtypes: where it fits, by name.
    under_compile: used in compiled blocks too, where it has been measured to be faster than what torch.compile makes.
    """

    op: str
    module: str
    dtypes: tuple[str, ...] = FLOATS
    priority: int = 10
    under_compile: bool = False


TRITON = (
    Entry("merge_attention", "attention.merge"),
    Entry("cross_entropy", "losses.cross_entropy"),
    Entry("vocabulary_statistics", "losses.vocabulary"),
    Entry("vocabulary_gradient", "losses.vocabulary"),
    Entry("linear_cross_entropy", "losses.linear_cross_entropy"),
    Entry("rms_norm", "norms.rms_norm"),
    Entry("layer_norm", "norms.layer_norm"),
    Entry("add_rms_norm", "norms.rms_norm"),
    Entry("add_layer_norm", "norms.layer_norm"),
    Entry("rms_norm_fp8", "norms.rms_norm_fp8"),
    Entry("rotary", "positions.rotary"),
    Entry("swiglu", "gates.two"),
    Entry("geglu", "gates.two"),
    Entry("packed_swiglu", "gates.packed"),
    Entry("packed_geglu", "gates.packed"),
    Entry("route", "experts.route"),
    Entry("expert_order", "experts.order"),
    Entry("expert_permute", "experts.rows"),
    Entry("expert_unpermute", "experts.rows"),
    Entry("experts", "experts.layer"),
    Entry("adamw_step", "optimizers.adamw"),
    Entry("lion_step", "optimizers.lion"),
    Entry("sgd_step", "optimizers.sgd"),
    Entry("symmetric_product", "optimizers.symmetric_product"),
    Entry("quantize_fp8", "low_precision.quantize_fp8"),
    Entry("quantize_blocks", "low_precision.blocks"),
    Entry("dequantize_blocks_sum", "low_precision.blocks"),
)


TORCH = (
    Entry("grouped_matmul", "experts.grouped_matmul", ("bfloat16",)),
    Entry("scaled_matmul", "low_precision.scaled_matmul"),
)
"""Kernels of torch's own, on CUDA, each behind one interface."""

CPU = (Entry("adamw_step", "cpu.adamw"),)
"""In C++, for masters in float32, whatever the model computes in."""


@dataclass(frozen=True)
class Deferred:
    """A function by module and name, imported when it is called first."""

    module: str
    name: str

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.resolved()(*arguments, **keywords)

    def resolved(self) -> Any:
        """The function itself, for callers that compile through it."""
        return getattr(importlib.import_module(f"{__package__}.{self.module}"), self.name)


def implementations() -> tuple[OpImplementation, ...]:
    """All that can run here: Triton's where Triton is installed, those in C++ where a compiler is."""
    without_triton = tuple(
        OpImplementation(entry.op, "cpu_simd", Deferred(entry.module, entry.op), ("cpu",), entry.dtypes, entry.priority)
        for entry in CPU
        if compiler() is not None
    )
    without_triton += tuple(
        OpImplementation(entry.op, "torch", Deferred(entry.module, entry.op), ("cuda",), entry.dtypes, entry.priority)
        for entry in TORCH
    )
    if importlib.util.find_spec("triton") is None:
        return without_triton
    devices = ("cuda", "cpu") if interpreted() else ("cuda",)
    return (
        tuple(
            OpImplementation(
                entry.op,
                "triton",
                Deferred(entry.module, entry.op),
                devices,
                entry.dtypes,
                entry.priority,
                entry.under_compile,
            )
            for entry in TRITON
        )
        + without_triton
    )
