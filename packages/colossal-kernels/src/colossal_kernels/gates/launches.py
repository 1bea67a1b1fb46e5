"""Launches of the gates' kernels, for two tensors and for one that holds both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from colossal_kernels.gates.gated import backward_config, backward_kernel, forward_config, forward_kernel
from colossal_kernels.row_layout import RowLayout, num_rows, row_layout, with_rows


class Gate(NamedTuple):
    """kind: silu, gelu or gelu_tanh. interleaved: gate and up in turn in one tensor. limit: None: nothing is clamped."""

    kind: str
    interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0

    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        clamped = self.limit is not None
        return {"KIND": self.kind, "INTERLEAVED": self.interleaved, "CLAMPED": clamped}

    def numbers(self) -> tuple[float, float, float]:
        return self.alpha, self.limit if self.limit is not None else 0.0, self.shift


class Sides(NamedTuple):
    """gate and up: where each starts (the same tensor where interleaved). layout: of both. rows, columns: of each."""

    gate: Tensor
    up: Tensor
    layout: RowLayout
    rows: int
    columns: int


def two_sides(gate: Tensor, up: Tensor, *, flat: bool) -> Sides:
    """Of two tensors. flat: rows mean nothing, so contiguous ones are one row; unlike layouts are copied."""
    rows, columns = num_rows(gate), gate.shape[-1]
    layout = row_layout(gate)
    if layout is None or row_layout(up) != layout:
        gate, up = gate.contiguous(), up.contiguous()
        layout = RowLayout(1, 1, columns, 0, 0)
    if flat and layout == (1, 1, columns, 0, 0):
        rows, columns = 1, rows * columns
        layout = RowLayout(1, 1, columns, 0, 0)
    return Sides(gate, up, layout, rows, columns)


def packed_sides(gate_up: Tensor, interleaved: bool, *, flat: bool) -> Sides:
    """Of one tensor [..., 2F]. flat: rows mean nothing, so a contiguous one whose gate and up are in turn is one row."""
    gate_up, layout = with_rows(gate_up)
    rows, half = num_rows(gate_up), gate_up.shape[-1] // 2
    if flat and interleaved:
        assert gate_up.is_contiguous()
        rows, half = 1, rows * half
        layout = RowLayout(1, 1, 2 * half, 0, 0)
    return Sides(gate_up, gate_up if interleaved else gate_up[..., half:], layout, rows, half)


def launch_forward(sides: Sides, weights: Tensor | None, y: Tensor, gate: Gate) -> None:
    """y: contiguous."""
    config = forward_config(sides.columns)
    tiles = triton.cdiv(sides.rows, config.rows) * triton.cdiv(sides.columns, config.columns)
    forward_kernel[(tiles,)](
        sides.gate, sides.up, _rows_of(weights), y, sides.rows, sides.columns, *gate.numbers(), *sides.layout,
        **gate.constants(), WEIGHTED=weights is not None, ROWS=config.rows, COLUMNS=config.columns,
        num_warps=config.warps,
    )  # fmt: skip


def launch_backward(grad_y: Tensor, sides: Sides, weights: Tensor | None, grads: Sides, gate: Gate) -> Tensor:
    """Writes the gradients of both sides where `grads` says, which may be where the sides are; returns that of the weights (or nothing)."""
    config = backward_config(sides.columns, gate.interleaved)
    if sides.columns != grad_y.shape[-1]:
        grad_y, layout = grad_y.contiguous(), RowLayout(1, 1, sides.columns, 0, 0)
    else:
        grad_y, layout = with_rows(grad_y)
    grad_weights = like_weights(grad_y, weights)
    tiles = 1 if weights is not None else triton.cdiv(sides.columns, config.columns)
    backward_kernel[(triton.cdiv(sides.rows, config.rows) * tiles,)](
        grad_y, sides.gate, sides.up, _rows_of(weights), grads.gate, grads.up, grad_weights, sides.rows, sides.columns,
        *gate.numbers(), *layout, *sides.layout, *grads.layout, **gate.constants(), WEIGHTED=weights is not None,
        ROWS=config.rows, COLUMNS=config.columns, num_warps=config.warps,
    )  # fmt: skip
    return grad_weights


def like_weights(grad_y: Tensor, weights: Tensor | None) -> Tensor:
    """Memory for the gradient of the weights, contiguous; of no elements where there are none."""
    if weights is None:
        return grad_y.new_empty(0)
    return torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)


def _rows_of(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.contiguous()
