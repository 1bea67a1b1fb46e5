"""Joining attention over parts of the keys: one read of each part and one write, and backward, for each part, three reads and a write. The
formula is the reference's. In a ring, a step joins what has come to what there is, in its memory.

Legend: B sequences, H heads, L queries, D features, R rows of a program. Heads, queries and sequences may be any distance apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops import attention as reference
from colossal_kernels.builds import Build
from colossal_kernels.fitting import has_each_once, kernels_take
from colossal_kernels.library import define, differentiate

MOST_FEATURES = 512
TILE_ELEMENTS, WARPS = 4096, 4
"""Elements of each tensor that a program holds, and its warps."""


def merge_attention(
    outputs: Sequence[Tensor], lses: Sequence[Tensor], *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """`colossal_core.ops.reference.merge_attention`, computed in float32 throughout; more than two parts are joined one after the other in
    float32. Outputs of one shape and dtype (with `overwrite` the first may have another) whose features are neighbours; others are copied.
    """
    assert len(outputs) == len(lses) > 0, f"{len(outputs)} outputs, {len(lses)} lses"
    if not _is_served(outputs, lses):
        return reference.merge_attention(outputs, lses, overwrite=overwrite)
    parts, of_parts = [_rows(part) for part in outputs[1:]], [lse.contiguous() for lse in lses[1:]]
    if not overwrite:
        out, lse = _MERGE([_rows(outputs[0]), *parts], [lses[0].contiguous(), *of_parts])
        return out, lse
    out, lse = outputs[0].detach(), lses[0].detach()
    if len(outputs) == 1 or out.stride(-1) != 1 or not has_each_once(out) or not lse.is_contiguous():
        return reference.merge_attention(outputs, lses, overwrite=True)
    for part, of_part in zip(parts, of_parts, strict=True):
        _JOIN(out, lse, part.detach(), of_part.detach())
    if not torch.compiler.is_compiling() and not out.is_inference() and not lse.is_inference():
        # torch counts no version for operators of its library, and a backward pass that kept the old numbers must fail.
        torch.autograd.graph.increment_version((out, lse))
    return out, lse


def _is_served(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> bool:
    first = outputs[0]
    same = all(part.shape == first.shape and part.dtype == outputs[-1].dtype for part in outputs[1:])
    fitting = all(lse.shape == first.shape[:-1] and lse.dtype == torch.float32 for lse in lses)
    return same and fitting and first.dim() == 4 and first.shape[-1] <= MOST_FEATURES and kernels_take(*outputs, *lses)


def _rows(part: Tensor) -> Tensor:
    return part if part.stride(-1) == 1 else part.contiguous()


@triton.jit
def _place(row_R, num_heads, num_queries, sequence_stride, head_stride, query_stride):
    query_R = row_R % num_queries
    head_R = (row_R // num_queries) % num_heads
    sequence_R = row_R // num_queries // num_heads
    return sequence_R * sequence_stride + head_R * head_stride + query_R * query_stride


@triton.jit
def _merge_kernel(
    a, lse_a, b, lse_b, out, lse, num_rows, num_heads, num_queries, num_features,
    a_sequence, a_head, a_query, b_sequence, b_head, b_query, out_sequence, out_head, out_query,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out may be a, and lse lse_a."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row_R < num_rows
    feature = tl.arange(0, BLOCK)
    inside = there[:, None] & (feature < num_features)[None, :]
    first = tl.load(lse_a + row_R, mask=there, other=0.0)
    second = tl.load(lse_b + row_R, mask=there, other=0.0)
    largest = tl.maximum(first, second)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    of_a = tl.exp(first - largest)
    of_b = tl.exp(second - largest)
    total = of_a + of_b
    unseen = total == 0.0
    at_a = a + _place(row_R, num_heads, num_queries, a_sequence, a_head, a_query)
    at_b = b + _place(row_R, num_heads, num_queries, b_sequence, b_head, b_query)
    a_RD = tl.load(at_a[:, None] + feature[None, :], mask=inside & (of_a != 0.0)[:, None], other=0.0).to(tl.float32)
    b_RD = tl.load(at_b[:, None] + feature[None, :], mask=inside & (of_b != 0.0)[:, None], other=0.0).to(tl.float32)
    total = tl.where(unseen, 1.0, total)
    out_RD = a_RD * (of_a / total)[:, None] + b_RD * (of_b / total)[:, None]
    at_out = out + _place(row_R, num_heads, num_queries, out_sequence, out_head, out_query)
    # Several warps read the lse of a row, which one of them writes over.
    tl.debug_barrier()
    tl.store(at_out[:, None] + feature[None, :], out_RD.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row_R, tl.where(unseen, float("-inf"), tl.log(total) + largest), mask=there)


@triton.jit
def _backward_kernel(
    grad_out, grad_lse, out, lse, part, of_part, grad_part, grad_of_part, num_rows, num_heads, num_queries, num_features,
    grad_sequence, grad_head, grad_query, out_sequence, out_head, out_query, part_sequence, part_head, part_query,
    HAS_LSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_part = w grad_out and grad_of_part = w (grad_out . (part - out) + grad_lse), w = exp(of_part - lse). grad_part is contiguous."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row_R < num_rows
    feature = tl.arange(0, BLOCK)
    inside = there[:, None] & (feature < num_features)[None, :]
    lse_R = tl.load(lse + row_R, mask=there, other=0.0)
    lse_R = tl.where(lse_R == float("-inf"), 0.0, lse_R)
    weight_R = tl.exp(tl.load(of_part + row_R, mask=there, other=float("-inf")) - lse_R)
    at_grad = grad_out + _place(row_R, num_heads, num_queries, grad_sequence, grad_head, grad_query)
    at_out = out + _place(row_R, num_heads, num_queries, out_sequence, out_head, out_query)
    at_part = part + _place(row_R, num_heads, num_queries, part_sequence, part_head, part_query)
    seen = inside & (weight_R != 0.0)[:, None]
    grad_RD = tl.load(at_grad[:, None] + feature[None, :], mask=seen, other=0.0).to(tl.float32)
    apart_RD = tl.load(at_part[:, None] + feature[None, :], mask=seen, other=0.0).to(tl.float32)
    apart_RD -= tl.load(at_out[:, None] + feature[None, :], mask=seen, other=0.0).to(tl.float32)
    grad_RD *= weight_R[:, None]
    towards_R = tl.sum(grad_RD * apart_RD, axis=1)
    if HAS_LSE:
        towards_R += weight_R * tl.load(grad_lse + row_R, mask=there & (weight_R != 0.0), other=0.0)
    target = grad_part + row_R[:, None] * num_features + feature[None, :]
    tl.store(target, grad_RD.to(grad_part.dtype.element_ty), mask=inside)
    tl.store(grad_of_part + row_R, towards_R, mask=there)


def _grid(part: Tensor) -> tuple[tuple[int], tuple[int, int]]:
    """Programs, and rows and columns of a tile."""
    block = triton.next_power_of_2(part.shape[-1])
    rows = max(1, TILE_ELEMENTS // block)
    return (triton.cdiv(part.shape[0] * part.shape[1] * part.shape[2], rows),), (rows, block)


def _sizes(part: Tensor) -> tuple[int, int, int, int]:
    sequences, heads, queries, features = part.shape
    return sequences * heads * queries, heads, queries, features


def _launch(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    grid, tile = _grid(out)
    strides = itertools.chain.from_iterable(part.stride()[:3] for part in (a, b, out))
    _merge_kernel[grid](a, lse_a, b, lse_b, out, lse, *_sizes(out), *strides, *tile, num_warps=WARPS)


def _merge(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = outputs[0], lses[0]
    found, of_found = out.new_empty(out.shape), lse.new_empty(lse.shape)
    if len(outputs) == 1:
        return found.copy_(out.masked_fill((lse == -math.inf).unsqueeze(-1), 0.0)), of_found.copy_(lse)
    wide = lse.new_empty(out.shape if len(outputs) > 2 else 0)
    for part, of_part in zip(outputs[1:-1], lses[1:-1], strict=True):
        _launch(out, lse, part, of_part, wide, of_found)
        out, lse = wide, of_found
    _launch(out, lse, outputs[-1], lses[-1], found, of_found)
    return found, of_found


def _merge_fake(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return outputs[0].new_empty(outputs[0].shape), lses[0].new_empty(lses[0].shape)


def _join(out: Tensor, lse: Tensor, part: Tensor, of_part: Tensor) -> None:
    _launch(out, lse, part, of_part, out, lse)


def _join_fake(out: Tensor, lse: Tensor, part: Tensor, of_part: Tensor) -> None:
    return None


def _part_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, part: Tensor, of_part: Tensor
) -> tuple[Tensor, Tensor]:
    grad_part, grad_of_part = part.new_empty(part.shape), of_part.new_empty(of_part.shape)
    grid, tile = _grid(out)
    strides = itertools.chain.from_iterable(tensor.stride()[:3] for tensor in (grad_out, out, part))
    _backward_kernel[grid](
        grad_out, grad_lse, out, lse, part, of_part, grad_part, grad_of_part, *_sizes(out), *strides,
        grad_lse is not None, *tile, num_warps=WARPS,
    )  # fmt: skip
    return grad_part, grad_of_part


def _part_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, part: Tensor, of_part: Tensor
) -> tuple[Tensor, Tensor]:
    return part.new_empty(part.shape), of_part.new_empty(of_part.shape)


_MERGE = define("merge_attention(Tensor[] outputs, Tensor[] lses) -> (Tensor, Tensor)", _merge, _merge_fake)
_JOIN = define("merge_attention_(Tensor(a!) out, Tensor(b!) lse, Tensor part, Tensor of_part) -> ()", _join, _join_fake)
_BACKWARD = define(
    "merge_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor part, Tensor of_part)"
    " -> (Tensor, Tensor)",
    _part_backward,
    _part_backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    outputs, lses = inputs
    ctx.save_for_backward(*outputs, *lses, *output)
    ctx.num_parts = len(outputs)


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    *parts, out, lse = ctx.saved_tensors
    grad_out, grad_lse = _rows(grad_out), grad_lse.contiguous()
    found = [
        _BACKWARD(grad_out, grad_lse, out, lse, part, of_part)
        for part, of_part in zip(parts[: ctx.num_parts], parts[ctx.num_parts :], strict=True)
    ]
    return [grad_part for grad_part, _ in found], [grad_of_part for _, grad_of_part in found]


differentiate("merge_attention", _gradients, _save)


def builds() -> tuple[Build, ...]:
    """Heads of 128 features."""
    sizes = ("num_rows", "num_heads", "num_queries", "num_features")
    strides = [f"{name}_{axis}" for name in ("a", "b", "out", "grad", "part") for axis in ("sequence", "head", "query")]
    types = dict.fromkeys((*sizes, *strides), "i32")
    types |= dict.fromkeys(("lse_a", "lse_b", "lse", "grad_lse", "of_part", "grad_of_part"), "*fp32")
    types |= dict.fromkeys(("b", "out", "part", "grad_out", "grad_part"), "*bf16") | {"a": "*bf16"}
    tile = {"ROWS": TILE_ELEMENTS // 128, "BLOCK": 128}

    def build(name: str, kernel: Any, types: dict[str, str], **constants: Any) -> Build:
        needed = {name: types[name] for name in kernel.arg_names if name in types}
        return Build(name, kernel, needed, tile | constants, WARPS, aligned=(*strides, "num_features"))

    return (
        build("merge_attention bf16 128", _merge_kernel, types),
        build("merge_attention into fp32 128", _merge_kernel, types | {"a": "*fp32", "out": "*fp32"}),
        build("merge_attention_backward bf16 128", _backward_kernel, types, HAS_LSE=True),
    )
