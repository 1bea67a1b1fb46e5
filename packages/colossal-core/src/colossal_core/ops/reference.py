"""The reference of every op: plain PyTorch, right on any device and dtype. Faster ones are measured and tested against
these.

This is the one place to read the signatures that an implementation of each op in `OP_NAMES` keeps to.
"""

from __future__ import annotations

from colossal_core.ops.adamw import AdamWSettings, adamw_step, adamw_step_fused
from colossal_core.ops.attention import attention, merge_attention
from colossal_core.ops.cross_entropy import LossTerms, cross_entropy
from colossal_core.ops.experts import expert_order, expert_permute, expert_unpermute, experts, grouped_matmul, route
from colossal_core.ops.linear_cross_entropy import linear_cross_entropy
from colossal_core.ops.lion import LionSettings, lion_step
from colossal_core.ops.low_precision import dequantize_blocks_sum, quantize_blocks, quantize_fp8, scaled_matmul
from colossal_core.ops.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm, rms_norm_fp8
from colossal_core.ops.rotary import rotary
from colossal_core.ops.sgd import SGDSettings, sgd_step
from colossal_core.ops.swiglu import geglu, packed_geglu, packed_swiglu, swiglu
from colossal_core.ops.symmetric_product import symmetric_product
from colossal_core.ops.table import OpImplementation
from colossal_core.ops.vocabulary import Words, vocabulary_gradient, vocabulary_statistics

__all__ = [
    "AdamWSettings",
    "LionSettings",
    "LossTerms",
    "SGDSettings",
    "Words",
    "adamw_step",
    "adamw_step_fused",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "dequantize_blocks_sum",
    "expert_order",
    "expert_permute",
    "expert_unpermute",
    "experts",
    "geglu",
    "grouped_matmul",
    "layer_norm",
    "linear_cross_entropy",
    "lion_step",
    "merge_attention",
    "packed_geglu",
    "packed_swiglu",
    "quantize_blocks",
    "quantize_fp8",
    "reference_ops",
    "rms_norm",
    "rms_norm_fp8",
    "rotary",
    "route",
    "scaled_matmul",
    "sgd_step",
    "swiglu",
    "symmetric_product",
    "torch_ops",
    "vocabulary_gradient",
    "vocabulary_statistics",
]


def torch_ops() -> tuple[OpImplementation, ...]:
    """Kernels of torch's own that do an op in fewer passes than its reference, on CUDA; masters are float32 there under these dtypes."""
    dtypes = ("float32", "bfloat16", "float16")
    return (OpImplementation("adamw_step", "torch_fused", adamw_step_fused, ("cuda",), dtypes, priority=1),)


def reference_ops() -> tuple[OpImplementation, ...]:
    """One implementation of each op, in the order of `OP_NAMES`: provider `reference`, priority 0, everywhere."""
    functions = (
        rms_norm,
        layer_norm,
        add_rms_norm,
        add_layer_norm,
        rms_norm_fp8,
        rotary,
        swiglu,
        geglu,
        packed_swiglu,
        packed_geglu,
        route,
        expert_order,
        expert_permute,
        expert_unpermute,
        grouped_matmul,
        experts,
        quantize_fp8,
        scaled_matmul,
        attention,
        merge_attention,
        cross_entropy,
        vocabulary_statistics,
        vocabulary_gradient,
        linear_cross_entropy,
        quantize_blocks,
        dequantize_blocks_sum,
        adamw_step,
        lion_step,
        sgd_step,
        symmetric_product,
    )
    return tuple(OpImplementation(function.__name__, "reference", function) for function in functions)
