"""The reference of every op: plain PyTorch, right on any device and dtype. Faster ones are measured and tested against
these.

This is the one place to read the signatures that an implementation of each op in `OP_NAMES` keeps to.
"""

from __future__ import annotations

from colossal_core.ops.adamw import AdamWSettings, adamw_step, adamw_step_fused
from colossal_core.ops.attention import attention
from colossal_core.ops.cross_entropy import cross_entropy
from colossal_core.ops.linear_cross_entropy import linear_cross_entropy
from colossal_core.ops.norms import layer_norm, rms_norm
from colossal_core.ops.rotary import rotary
from colossal_core.ops.swiglu import swiglu
from colossal_core.ops.table import OpImplementation

__all__ = [
    "AdamWSettings",
    "adamw_step",
    "adamw_step_fused",
    "attention",
    "cross_entropy",
    "layer_norm",
    "linear_cross_entropy",
    "reference_ops",
    "rms_norm",
    "rotary",
    "swiglu",
    "torch_ops",
]


def torch_ops() -> tuple[OpImplementation, ...]:
    """Kernels of torch's own that do an op in fewer passes than its reference, on CUDA; masters are float32 there under these dtypes."""
    dtypes = ("float32", "bfloat16", "float16")
    return (OpImplementation("adamw_step", "torch_fused", adamw_step_fused, ("cuda",), dtypes, priority=1),)


def reference_ops() -> tuple[OpImplementation, ...]:
    """One implementation of each op, in the order of `OP_NAMES`: provider `reference`, priority 0, everywhere."""
    functions = (rms_norm, layer_norm, rotary, swiglu, attention, cross_entropy, linear_cross_entropy, adamw_step)
    return tuple(OpImplementation(function.__name__, "reference", function) for function in functions)
