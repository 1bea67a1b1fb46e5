"""Joining attention over parts of the keys: one read of each part and one write, and backward one read of each part and of the gradient and
one write for each part. The formula is the reference's. In a ring, a step joins what has come to what there is, in its memory.

Legend: B sequences, H heads, L queries, D features, R rows of a program. Heads, queries and sequences may be any distance apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
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
AT_ONCE = 8
"""Parts that a program reads before any is used: as many as its kernel has arguments for."""
VECTORS, WARPS = 4, 2
"""Reads of 16 bytes of bf16 that a thread has under way, as far as each part has one, and the warps of a program."""
VECTOR = 8
"""Elements of such a read."""
LISTED = {"part": "bf16", "lse": "fp32", "target": "bf16"}


def merge_attention(
    outputs: Sequence[Tensor], lses: Sequence[Tensor], *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """`colossal_core.ops.reference.merge_attention`, computed in float32 throughout; what eight parts give is kept in float32 and
    joined to the next seven. Outputs of one shape and dtype (the first may have another dtype) whose features are neighbours; others are
    copied, and so are those after the first if they lie in memory each in another way.
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
def _place(row_R, num_heads, num_queries, sequence_stride, head_stride, query_stride, FLAT: tl.constexpr):
    """FLAT: all rows lie query_stride apart."""
    if FLAT:
        place_R = row_R.to(tl.int64) * query_stride
    else:
        head_R = row_R // num_queries
        place_R = (row_R % num_queries).to(tl.int64) * query_stride
        place_R += (head_R % num_heads).to(tl.int64) * head_stride
        place_R += (head_R // num_heads).to(tl.int64) * sequence_stride
    return place_R


@triton.jit
def _read(found, sources, places, mask, PARTS: tl.constexpr):
    """What is found already, and what the sources after as many hold."""
    for index in tl.static_range(len(found), PARTS):
        found += (tl.load(sources[index] + places, mask=mask, other=0.0),)
    return found


@triton.jit
def _merge_kernel(
    part_0, part_1, part_2, part_3, part_4, part_5, part_6, part_7,
    lse_0, lse_1, lse_2, lse_3, lse_4, lse_5, lse_6, lse_7, out, lse, num_rows, num_heads, num_queries, num_features,
    first_sequence, first_head, first_query, part_sequence, part_head, part_query, out_sequence, out_head, out_query,
    PARTS: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out may be part_0, and lse lse_0. No read waits for another: what a query does not see is read too, and not used."""
    parts = (part_0, part_1, part_2, part_3, part_4, part_5, part_6, part_7)
    lses = (lse_0, lse_1, lse_2, lse_3, lse_4, lse_5, lse_6, lse_7)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row_R < num_rows
    feature = tl.arange(0, BLOCK)
    inside = there[:, None] & (feature < num_features)[None, :]
    at_first = _place(row_R, num_heads, num_queries, first_sequence, first_head, first_query, FLAT)
    at_part = _place(row_R, num_heads, num_queries, part_sequence, part_head, part_query, FLAT)
    at_out = _place(row_R, num_heads, num_queries, out_sequence, out_head, out_query, FLAT)
    first_RD = tl.load(part_0 + at_first[:, None] + feature[None, :], mask=inside, other=0.0)
    found = _read((first_RD,), parts, at_part[:, None] + feature[None, :], inside, PARTS)
    # The assembler puts a read off to where it is used, which would leave one or two under way: never past a barrier, and what all of
    # them are multiplied by is read behind it.
    tl.debug_barrier()
    levels = _read((), lses, row_R, there, PARTS)
    largest = levels[0]
    for index in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, levels[index])
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.exp(levels[0] - largest)
    for index in tl.static_range(1, PARTS):
        total += tl.exp(levels[index] - largest)
    unseen = total == 0.0
    total = tl.where(unseen, 1.0, total)
    share = 1.0 / total
    out_RD = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for index in tl.static_range(PARTS):
        weight = tl.exp(levels[index] - largest) * share
        out_RD += tl.where((weight != 0.0)[:, None], found[index].to(tl.float32), 0.0) * weight[:, None]
    # Several warps read the lse of a row, which one of them may write over.
    tl.debug_barrier()
    tl.store(out + at_out[:, None] + feature[None, :], out_RD.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row_R, tl.where(unseen, float("-inf"), tl.log(total) + largest), mask=there)


@triton.jit
def _backward_kernel(
    part_0, part_1, part_2, part_3, part_4, part_5, part_6, part_7,
    lse_0, lse_1, lse_2, lse_3, lse_4, lse_5, lse_6, lse_7,
    target_0, target_1, target_2, target_3, target_4, target_5, target_6, target_7,
    grad_out, grad_lse, lse, towards, num_rows, num_heads, num_queries, num_features,
    grad_sequence, grad_head, grad_query, part_sequence, part_head, part_query,
    PARTS: tl.constexpr, MOST_PARTS: tl.constexpr, ALL: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """target_i = w_i grad_out and towards_i = w_i (d_i - sum_j w_j d_j + grad_lse) with d_i = grad_out . part_i and the weights
    w_i = exp(lse_i - lse); targets and towards [PARTS, rows] are contiguous. Unless these are ALL parts, towards_i = d_i.
    """
    parts = (part_0, part_1, part_2, part_3, part_4, part_5, part_6, part_7)
    lses = (lse_0, lse_1, lse_2, lse_3, lse_4, lse_5, lse_6, lse_7)
    targets = (target_0, target_1, target_2, target_3, target_4, target_5, target_6, target_7)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row_R < num_rows
    feature = tl.arange(0, BLOCK)
    inside = there[:, None] & (feature < num_features)[None, :]
    at_grad = _place(row_R, num_heads, num_queries, grad_sequence, grad_head, grad_query, FLAT)
    at_part = _place(row_R, num_heads, num_queries, part_sequence, part_head, part_query, FLAT)
    at_target = row_R.to(tl.int64) * num_features
    found = _read((), parts, at_part[:, None] + feature[None, :], inside, PARTS)
    grad_lse_R = tl.load(grad_lse + row_R, mask=there, other=0.0)
    # As in the forward direction: all reads are under way before any is used.
    tl.debug_barrier()
    lse_R = tl.load(lse + row_R, mask=there, other=0.0)
    levels = _read((), lses, row_R, there, PARTS)
    grad_RD = tl.load(grad_out + at_grad[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    lse_R = tl.where(lse_R == float("-inf"), 0.0, lse_R)
    share = tl.zeros((ROWS,), dtype=tl.float32) + 1.0
    if ALL:
        # Their sum is 1 but for the rounding of lse, which counts where it is large.
        total = tl.exp(levels[0] - lse_R)
        for index in tl.static_range(1, PARTS):
            total += tl.exp(levels[index] - lse_R)
        share = 1.0 / tl.where(total == 0.0, 1.0, total)
    mean = tl.zeros((ROWS,), dtype=tl.float32)
    products = levels[:0]
    for index in tl.static_range(PARTS):
        weight = tl.exp(levels[index] - lse_R) * share
        seen = weight != 0.0
        product = tl.where(seen, tl.sum(grad_RD * found[index].to(tl.float32), axis=1), 0.0)
        products += (product,)
        mean += weight * product
        target_RD = tl.where(seen[:, None], grad_RD * weight[:, None], 0.0).to(targets[index].dtype.element_ty)
        tl.store(targets[index] + at_target[:, None] + feature[None, :], target_RD, mask=inside)
    if ALL:
        mean -= grad_lse_R
    # One tile of all parts changes threads once before it is stored; a row of each would do so each for itself.
    part_P = tl.arange(0, MOST_PARTS)
    towards_RP = tl.zeros((ROWS, MOST_PARTS), dtype=tl.float32)
    for index in tl.static_range(PARTS):
        towards_R = products[index]
        if ALL:
            weight = tl.exp(levels[index] - lse_R) * share
            towards_R = weight * tl.where(weight != 0.0, towards_R - mean, 0.0)
        towards_RP = tl.where((part_P == index)[None, :], towards_R[:, None], towards_RP)
    at_RP = row_R.to(tl.int64)[:, None] + (part_P.to(tl.int64) * num_rows)[None, :]
    tl.store(towards + at_RP, towards_RP, mask=there[:, None] & (part_P < PARTS)[None, :])


def _tile(part: Tensor, count: int) -> tuple[tuple[int], tuple[int, int]]:
    """Programs, and rows and columns of the tile of each of so many parts."""
    block = triton.next_power_of_2(part.shape[-1])
    rows = max(1, VECTOR * 32 * WARPS * max(1, VECTORS // count) // block)
    return (triton.cdiv(part.shape[0] * part.shape[1] * part.shape[2], rows),), (rows, block)


def _sizes(part: Tensor) -> tuple[int, int, int, int]:
    sequences, heads, queries, features = part.shape
    return sequences * heads * queries, heads, queries, features


def _strides(*tensors: Tensor) -> Iterator[int]:
    return itertools.chain.from_iterable(tensor.stride()[:3] for tensor in tensors)


def _are_flat(*tensors: Tensor) -> bool:
    """Whether all rows of each are as far apart as two queries."""
    sequences, heads, queries, _ = tensors[0].shape
    return all(
        (heads == 1 or tensor.stride(1) == queries * tensor.stride(2))
        and (sequences == 1 or tensor.stride(0) == heads * queries * tensor.stride(2))
        for tensor in tensors
    )


def _alike(parts: list[Tensor]) -> list[Tensor]:
    """With one layout, which the kernels are told once."""
    return parts if all(part.stride() == parts[0].stride() for part in parts) else [part.contiguous() for part in parts]


def _all_eight(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [*tensors, *itertools.repeat(None, AT_ONCE - len(tensors))]


def _launch(outputs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """At most AT_ONCE parts, of which the first may be out."""
    parts = [outputs[0], *_alike(outputs[1:])]
    grid, tile = _tile(out, len(parts))
    described = parts[0], parts[1], out
    _merge_kernel[grid](
        *_all_eight(parts), *_all_eight(lses), out, lse, *_sizes(out), *_strides(*described),
        len(parts), _are_flat(*described), *tile, num_warps=WARPS,
    )  # fmt: skip


def _merge(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = outputs[0], lses[0]
    found, of_found = out.new_empty(out.shape), lse.new_empty(lse.shape)
    if len(outputs) == 1:
        return found.copy_(out.masked_fill((lse == -math.inf).unsqueeze(-1), 0.0)), of_found.copy_(lse)
    parts, of_parts = outputs[1:], lses[1:]
    if len(outputs) > AT_ONCE:
        wide = lse.new_empty(out.shape)
    while len(parts) >= AT_ONCE:
        _launch([out, *parts[: AT_ONCE - 1]], [lse, *of_parts[: AT_ONCE - 1]], wide, of_found)
        out, lse, parts, of_parts = wide, of_found, parts[AT_ONCE - 1 :], of_parts[AT_ONCE - 1 :]
    _launch([out, *parts], [lse, *of_parts], found, of_found)
    return found, of_found


def _merge_fake(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return outputs[0].new_empty(outputs[0].shape), lses[0].new_empty(lses[0].shape)


def _join(out: Tensor, lse: Tensor, part: Tensor, of_part: Tensor) -> None:
    _launch([out, part], [lse, of_part], out, lse)


def _join_fake(out: Tensor, lse: Tensor, part: Tensor, of_part: Tensor) -> None:
    return None


def _backward(
    grad_out: Tensor, grad_lse: Tensor, lse: Tensor, outputs: list[Tensor], lses: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    found, towards = _backward_fake(grad_out, grad_lse, lse, outputs, lses)
    parts, whole = _alike(outputs), len(outputs) <= AT_ONCE
    for start in range(0, len(parts), AT_ONCE):
        now = slice(start, start + AT_ONCE)
        grid, tile = _tile(grad_out, len(parts[now]))
        described = grad_out, parts[0]
        _backward_kernel[grid](
            *_all_eight(parts[now]), *_all_eight(lses[now]), *_all_eight(found[now]), grad_out, grad_lse, lse, towards[now],
            *_sizes(grad_out), *_strides(*described), len(parts[now]), triton.next_power_of_2(len(parts[now])), whole,
            _are_flat(*described), *tile, num_warps=WARPS,
        )  # fmt: skip
    if whole:
        return found, towards
    weights = (torch.stack(lses) - lse.masked_fill(lse == -math.inf, 0.0)).exp()
    weights /= weights.sum(0).masked_fill(lse == -math.inf, 1.0)
    towards += grad_lse - (weights * towards).sum(0)
    return found, torch.where(weights == 0.0, 0.0, weights * towards)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor, lse: Tensor, outputs: list[Tensor], lses: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    return [part.new_empty(part.shape) for part in outputs], lse.new_empty((len(lses), *lse.shape))


_MERGE = define("merge_attention(Tensor[] outputs, Tensor[] lses) -> (Tensor, Tensor)", _merge, _merge_fake)
_JOIN = define("merge_attention_(Tensor(a!) out, Tensor(b!) lse, Tensor part, Tensor of_part) -> ()", _join, _join_fake)
_BACKWARD = define(
    "merge_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor lse, Tensor[] outputs, Tensor[] lses)"
    " -> (Tensor[], Tensor)",
    _backward,
    _backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    outputs, lses = inputs
    ctx.save_for_backward(*outputs, *lses, output[1])
    ctx.num_parts = len(outputs)


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    *parts, lse = ctx.saved_tensors
    outputs, lses = parts[: ctx.num_parts], parts[ctx.num_parts :]
    found, towards = _BACKWARD(_rows(grad_out), grad_lse.contiguous(), lse, outputs, lses)
    return found, list(towards.unbind())


differentiate("merge_attention", _gradients, _save)


def builds() -> tuple[Build, ...]:
    """Heads of 128 features."""
    sizes = ("num_rows", "num_heads", "num_queries", "num_features")
    strides = [f"{name}_{axis}" for name in ("first", "part", "out", "grad") for axis in ("sequence", "head", "query")]
    types = dict.fromkeys((*sizes, *strides), "i32")
    types |= dict.fromkeys(("lse", "grad_lse", "towards"), "*fp32") | dict.fromkeys(("out", "grad_out"), "*bf16")

    def build(name: str, kernel: Any, count: int, changed: dict[str, str], **constants: int) -> Build:
        listed = {f"{name}_{at}": f"*{kind}" for name, kind in LISTED.items() for at in range(count)}
        needed = {name: kind for name, kind in (types | listed | changed).items() if name in kernel.arg_names}
        rows = VECTOR * 32 * WARPS * max(1, VECTORS // count) // 128
        absent = {name: None for name in kernel.arg_names if name[-1].isdigit() and name not in needed}
        fixed = absent | {"PARTS": count, "FLAT": True, "ROWS": rows, "BLOCK": 128} | constants
        return Build(f"merge_attention {name} 128", kernel, needed, fixed, WARPS, aligned=(*strides, "num_features"))

    wide = {"part_0": "*fp32", "out": "*fp32"}
    return (
        build("2 bf16", _merge_kernel, 2, {}),
        build("8 bf16", _merge_kernel, 8, {}),
        build("into fp32", _merge_kernel, 2, wide),
        build("backward 2 bf16", _backward_kernel, 2, {}, MOST_PARTS=2, ALL=True),
        build("backward 8 bf16", _backward_kernel, 8, {}, MOST_PARTS=8, ALL=True),
    )
