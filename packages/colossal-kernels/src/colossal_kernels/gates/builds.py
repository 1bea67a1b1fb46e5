"""Builds of the gates' kernels, by the configuration that a launch would take."""

from __future__ import annotations

from typing import Any

from colossal_kernels.builds import Build
from colossal_kernels.gates.gated import backward_config, backward_kernel, forward_config, forward_kernel
from colossal_kernels.gates.launches import Gate

TENSORS = ("gate", "up", "weights", "y", "grad_y", "grad_gate", "grad_up")


def gate_builds(name: str, columns: int, gate: Gate, *, weighted: bool = False) -> tuple[Build, Build]:
    """Forward and backward in bf16, rows with one stride, weights and their gradient in float32."""
    config = backward_config(columns, gate.interleaved)
    return (
        _build(f"{name} bf16 {columns}", forward_kernel, forward_config(columns), gate, weighted),
        _build(f"{name}_backward bf16 {columns}", backward_kernel, config, gate, weighted),
    )


def _build(name: str, kernel: Any, config: Any, gate: Gate, weighted: bool) -> Build:
    constants = {**gate.constants(), "WEIGHTED": weighted, "ROWS": config.rows, "COLUMNS": config.columns}
    types = {}
    for argument in kernel.arg_names:
        if argument.endswith(("_middle", "_inner")):
            constants[argument] = 1
        elif argument not in constants:
            numbers = "fp32" if argument in ("alpha", "limit", "shift") else "i32"
            types[argument] = "*bf16" if argument in TENSORS else numbers
    types["weights"] = "*fp32"
    if "grad_weights" in types:
        types["grad_weights"] = "*fp32"
    aligned = tuple(key for key in types if key == "num_columns" or key.endswith("_stride"))
    return Build(name, kernel, types, constants, config.warps, aligned=aligned)
