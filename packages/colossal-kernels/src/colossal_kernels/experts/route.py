"""Softmax, top-k and normalisation in one pass: a row of logits is read once, K weights and K indices are written; backward reads it again
and writes its gradient. 8192 rows of 128: 5 MB forward, so the time is that of a launch.

Formula: `colossal_core.ops.experts.route`. A logit and its column are one int64 key, ordered as the floats are, so that one maximum finds
both and ties go to the lower column. Letters: N tokens, E experts (`E2` the next power of two), K choices (`K2` likewise).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops import experts as reference
from colossal_kernels.builds import Build
from colossal_kernels.fitting import kernels_take
from colossal_kernels.library import define, differentiate

MOST_EXPERTS = 1024
MOST_CHOICES = 32
TILE_ELEMENTS = 2048
"""Logits of one program."""


def route(logits: Tensor, top_k: int, *, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """`colossal_core.ops.reference.route`. Keeps the logits, the weights and one float32 a row for the backward pass."""
    few = 0 < top_k <= min(logits.shape[-1], MOST_CHOICES) and logits.shape[-1] <= MOST_EXPERTS
    if not few or logits.dim() != 2 or not kernels_take(logits):
        return reference.route(logits, top_k, normalize=normalize)
    weights, experts, _ = _FORWARD(logits, top_k, normalize)
    return weights, experts


@triton.jit
def _forward_kernel(
    logits, weights, experts, lse, row_stride, num_rows, num_experts,
    K: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, E2: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    rows_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns_E = tl.arange(0, E2)
    inside_RE = (rows_R < num_rows)[:, None] & (columns_E < num_experts)[None, :]
    source_RE = logits + rows_R[:, None] * row_stride + columns_E[None, :]
    logits_RE = tl.load(source_RE, mask=inside_RE, other=0.0).to(tl.float32)
    bits_RE = logits_RE.to(tl.int32, bitcast=True)
    # The order of floats as that of integers: a negative one's other bits are turned, both zeros are one, a NaN is the largest.
    ordered_RE = tl.where(bits_RE < 0, bits_RE ^ 0x7FFFFFFF, bits_RE)
    ordered_RE = tl.where(logits_RE == 0.0, 0, ordered_RE)
    ordered_RE = tl.where(logits_RE != logits_RE, 0x7FFFFFFF, ordered_RE)
    keys_RE = (ordered_RE.to(tl.int64) << 32) | (E2 - 1 - columns_E).to(tl.int64)[None, :]
    lowest = -0x7FFFFFFFFFFFFFFF
    keys_RE = tl.where((columns_E < num_experts)[None, :], keys_RE, lowest)
    places_K = tl.arange(0, K2)
    chosen_RK = tl.zeros((ROWS, K2), dtype=tl.int32)
    values_RK = tl.full((ROWS, K2), float("-inf"), dtype=tl.float32)
    for k in tl.static_range(K):
        best_R = tl.max(keys_RE, axis=1)
        column_R = E2 - 1 - (best_R & 0xFFFFFFFF).to(tl.int32)
        picked_RE = columns_E[None, :] == column_R[:, None]
        value_R = tl.sum(tl.where(picked_RE, logits_RE, 0.0), axis=1)
        keys_RE = tl.where(picked_RE, lowest, keys_RE)
        chosen_RK = tl.where(places_K[None, :] == k, column_R[:, None], chosen_RK)
        values_RK = tl.where(places_K[None, :] == k, value_R[:, None], values_RK)
    # The first is the largest; of values that are all -inf the difference is NaN, as in the reference.
    most_R = tl.sum(tl.where(places_K[None, :] == 0, values_RK, 0.0), axis=1)
    shares_RK = tl.where((places_K < K)[None, :], tl.exp(values_RK - most_R[:, None]), 0.0)
    if NORMALIZE:
        total_R = tl.sum(shares_RK, axis=1)
    else:
        all_RE = tl.where((columns_E < num_experts)[None, :], tl.exp(logits_RE - most_R[:, None]), 0.0)
        total_R = tl.sum(all_RE, axis=1)
    outside_RK = (rows_R < num_rows)[:, None] & (places_K < K)[None, :]
    target_RK = rows_R[:, None] * K + places_K[None, :]
    tl.store(weights + target_RK, shares_RK / total_R[:, None], mask=outside_RK)
    tl.store(experts + target_RK, chosen_RK.to(tl.int64), mask=outside_RK)
    tl.store(lse + rows_R, most_R + tl.log(total_R), mask=rows_R < num_rows)


@triton.jit
def _backward_kernel(
    grad_weights, logits, weights, experts, lse, grad_logits, row_stride, num_rows, num_experts,
    K: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, E2: tl.constexpr,
):  # fmt: skip
    rows_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there_R = rows_R < num_rows
    columns_E = tl.arange(0, E2)
    inside_RE = there_R[:, None] & (columns_E < num_experts)[None, :]
    mean_R = tl.zeros((ROWS,), dtype=tl.float32)
    grad_RE = tl.zeros((ROWS, E2), dtype=tl.float32)
    for k in tl.static_range(K):
        share_R = tl.load(weights + rows_R * K + k, mask=there_R, other=0.0)
        mean_R += share_R * tl.load(grad_weights + rows_R * K + k, mask=there_R, other=0.0)
    if not NORMALIZE:
        logits_RE = tl.load(logits + rows_R[:, None] * row_stride + columns_E[None, :], mask=inside_RE, other=0.0)
        lse_R = tl.load(lse + rows_R, mask=there_R, other=0.0)
        grad_RE = -tl.exp(logits_RE.to(tl.float32) - lse_R[:, None]) * mean_R[:, None]
    for k in tl.static_range(K):
        share_R = tl.load(weights + rows_R * K + k, mask=there_R, other=0.0)
        part_R = share_R * (tl.load(grad_weights + rows_R * K + k, mask=there_R, other=0.0) - mean_R)
        column_R = tl.load(experts + rows_R * K + k, mask=there_R, other=0).to(tl.int32)
        grad_RE = tl.where(columns_E[None, :] == column_R[:, None], part_R[:, None], grad_RE)
    target_RE = rows_R[:, None] * num_experts + columns_E[None, :]
    tl.store(grad_logits + target_RE, grad_RE.to(grad_logits.dtype.element_ty), mask=inside_RE)


def _rows_of(num_experts: int) -> int:
    rows: int = max(TILE_ELEMENTS // triton.next_power_of_2(num_experts), 1)
    return rows


def _forward(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    logits_NE = logits if logits.stride(1) == 1 else logits.contiguous()
    num_tokens, num_experts = logits.shape
    weights, experts, lse = _forward_fake(logits, top_k, normalize)
    rows = _rows_of(num_experts)
    _forward_kernel[(triton.cdiv(num_tokens, rows),)](
        logits_NE, weights, experts, lse, logits_NE.stride(0), num_tokens, num_experts,
        top_k, normalize, rows, triton.next_power_of_2(num_experts), triton.next_power_of_2(top_k),
    )  # fmt: skip
    return weights, experts, lse


def _backward(
    grad_weights: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, lse: Tensor, normalize: bool
) -> Tensor:
    logits_NE = logits if logits.stride(1) == 1 else logits.contiguous()
    num_tokens, num_experts = logits.shape
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows = _rows_of(num_experts)
    _backward_kernel[(triton.cdiv(num_tokens, rows),)](
        grad_weights.contiguous(), logits_NE, weights, experts, lse, grad_logits, logits_NE.stride(0), num_tokens,
        num_experts, weights.shape[1], normalize, rows, triton.next_power_of_2(num_experts),
    )  # fmt: skip
    return grad_logits


def _forward_fake(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    del normalize
    shape = (logits.shape[0], top_k)
    weights, experts = logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)
    return weights, experts, logits.new_empty(logits.shape[0], dtype=torch.float32)


def _backward_fake(
    grad_weights: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, lse: Tensor, normalize: bool
) -> Tensor:
    del grad_weights, weights, experts, lse, normalize
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_FORWARD = define(
    "route(Tensor logits, int top_k, bool normalize) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake
)
_BACKWARD = define(
    "route_backward(Tensor grad_weights, Tensor logits, Tensor weights, Tensor experts, Tensor lse, bool normalize)"
    " -> Tensor",
    _backward,
    _backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    weights, experts, lse = output
    ctx.save_for_backward(inputs[0], weights, experts, lse)
    ctx.normalize = inputs[2]
    ctx.mark_non_differentiable(experts, lse)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_weights: Tensor | None, *others: None) -> tuple[Tensor | None, None, None]:
    del others
    if grad_weights is None:
        return None, None, None
    return _BACKWARD(grad_weights, *ctx.saved_tensors, ctx.normalize), None, None


differentiate("route", _gradients, _save)


def builds() -> tuple[Build, ...]:
    """Qwen3-MoE (8 of 128, normalised) and a router of 64 in float32 that is not."""
    found = []
    for dtype, experts, top_k, normalize in (("bf16", 128, 8, True), ("fp32", 64, 6, False)):
        name = f"{dtype} {top_k} of {experts}"
        sizes = {"row_stride": "i32", "num_rows": "i32", "num_experts": "i32"}
        types = {"logits": f"*{dtype}", "weights": "*fp32", "experts": "*i64", "lse": "*fp32", **sizes}
        constants = {"K": top_k, "NORMALIZE": normalize, "ROWS": _rows_of(experts), "E2": experts}
        forward = {**constants, "K2": triton.next_power_of_2(top_k)}
        aligned = ("row_stride", "num_experts")
        found.append(Build(f"route {name}", _forward_kernel, types, forward, aligned=aligned))
        types = {**types, "grad_weights": "*fp32", "grad_logits": f"*{dtype}"}
        found.append(Build(f"route_backward {name}", _backward_kernel, types, constants, aligned=aligned))
    return tuple(found)
