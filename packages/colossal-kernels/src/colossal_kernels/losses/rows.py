"""The kernels of losses over a vocabulary whose logits are kept. Of each row: statistics by one read (online maximum and sum, Milakov and
Gimelshein 2018, algorithm 3), and its gradient by one read and one write.

Legend: N rows, V columns, S parts of a row that different programs read, B columns at a time. Rows may be any distance apart, in 64 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops.cross_entropy import LossTerms
from colossal_core.ops.vocabulary import Words
from colossal_kernels.builds import Build
from colossal_kernels.losses.formulas import LARGEST, gradient_of_block, grown, logarithm, loss_of_row

MULTIPROCESSORS = 132
"""Of an H200. Fixed, so that sums are taken in the same order on every GPU."""
READ_BLOCK, READ_WARPS, READ_STAGES = 4096, 8, 3
"""Statistics: columns at a time, warps of a program, loads in flight."""
READ_PROGRAMS = 4 * MULTIPROCESSORS
"""With fewer rows than half of this, several programs share a row."""
WRITE_BLOCK, WRITE_WARPS, WRITE_BLOCKS = 4096, 8, 4
"""Gradient: columns at a time, warps, and how many times a program does it."""
MERGE_ROWS = 128
"""Rows of a program that joins parts."""


@triton.jit
def _statistics_kernel(
    logits, labels, parts, row_stride, num_rows, num_columns, first, ignore_index, columns_a_part, num_parts,
    SUM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """parts [S, 3 or 4, N]: maximum (finite), sum of exponentials relative to it, the label's logit or 0, sum of logits."""
    program = tl.program_id(0).to(tl.int64)
    row = program // num_parts
    part = program % num_parts
    label = tl.load(labels + row).to(tl.int64)
    counts = label != ignore_index
    start = (part * columns_a_part).to(tl.int32)
    stop = tl.where(counts, tl.minimum(start + columns_a_part, num_columns), start)
    x = logits + row * row_stride
    columns = tl.arange(0, BLOCK)
    largest = tl.full((), -LARGEST, tl.float32)
    sums_B = tl.zeros((BLOCK,), tl.float32)
    total_B = tl.zeros((BLOCK,), tl.float32)
    for column in tl.range(start, stop, BLOCK, num_stages=STAGES):
        inside = column + columns < stop
        x_B = tl.load(x + column + columns, mask=inside, other=float("-inf")).to(tl.float32)
        largest, sums_B = grown(largest, sums_B, x_B)
        if SUM:
            total_B += tl.where(inside, x_B, 0.0)
    place = label - first
    own = (place >= start) & (place < stop)
    chosen = tl.load(x + tl.where(own, place, 0), mask=own, other=0.0).to(tl.float32)
    out = parts + part * (3 + SUM) * num_rows + row
    tl.store(out, largest)
    out += num_rows
    tl.store(out, tl.sum(sums_B, axis=0))
    out += num_rows
    tl.store(out, chosen)
    if SUM:
        tl.store(out + num_rows, tl.sum(total_B, axis=0))


@triton.jit
def _merge_kernel(
    parts, labels, merged, lse, losses, num_rows, num_parts, num_words, ignore_index, z_loss, smoothing,
    LOSS: tl.constexpr, SUM: tl.constexpr, Z: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Joins the parts of rows: into statistics [3 or 4, N], or (LOSS) into logsumexp and the loss of each row."""
    row_R = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row_R < num_rows
    largest_R = tl.zeros((BLOCK,), tl.float32) - LARGEST
    sum_R = tl.zeros((BLOCK,), tl.float32)
    chosen_R = tl.zeros((BLOCK,), tl.float32)
    total_R = tl.zeros((BLOCK,), tl.float32)
    source = parts + row_R
    for _ in range(num_parts):
        of_part = tl.load(source, mask=inside, other=0.0)
        source += num_rows
        grown_R = tl.maximum(largest_R, of_part)
        sum_R *= tl.exp(largest_R - grown_R)
        sum_R += tl.load(source, mask=inside, other=0.0) * tl.exp(of_part - grown_R)
        source += num_rows
        largest_R = grown_R
        chosen_R += tl.load(source, mask=inside, other=0.0)
        source += num_rows
        if SUM:
            total_R += tl.load(source, mask=inside, other=0.0)
            source += num_rows
    label_R = tl.load(labels + row_R, mask=inside, other=0).to(tl.int64)
    counts = inside & (label_R != ignore_index)
    if LOSS:
        lse_R = tl.where(counts, logarithm(sum_R) + largest_R, 0.0)
        loss_R = loss_of_row(lse_R, chosen_R, total_R, num_words, z_loss, smoothing, SUM, Z)
        # A label that is no word has no logit, and must not pass for one of zero.
        loss_R = tl.where((label_R >= 0) & (label_R < num_words), loss_R, float("nan"))
        tl.store(lse + row_R, lse_R, mask=inside)
        tl.store(losses + row_R, tl.where(counts, loss_R, 0.0), mask=inside)
    else:
        largest_R = tl.where(largest_R >= LARGEST, float("inf"), largest_R)
        largest_R = tl.where(largest_R <= -LARGEST, float("-inf"), largest_R)
        target = merged + row_R
        tl.store(target, tl.where(counts, largest_R, 0.0), mask=inside)
        target += num_rows
        tl.store(target, sum_R, mask=inside)
        target += num_rows
        tl.store(target, chosen_R, mask=inside)
        if SUM:
            tl.store(target + num_rows, total_R, mask=inside)


@triton.jit
def _gradient_kernel(
    scale, logits, labels, lse, gradient, row_stride, gradient_stride, num_columns, own_columns, first, num_words,
    ignore_index, z_loss, smoothing, num_parts,
    Z: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """gradient may be logits. Columns from own_columns on are padding."""
    program = tl.program_id(0).to(tl.int64)
    row = program // num_parts
    label = tl.load(labels + row).to(tl.int64)
    place = label - first
    place = tl.where(place < own_columns, place, -1)
    x = logits + row * row_stride
    out = gradient + row * gradient_stride
    columns = (program % num_parts).to(tl.int32) * (BLOCK * BLOCKS) + tl.arange(0, BLOCK)
    if label != ignore_index:
        factor = tl.load(scale).to(tl.float32)
        lse_of_row = tl.load(lse + row)
        for _ in tl.static_range(BLOCKS):
            inside = columns < num_columns
            x_B = tl.load(x + columns, mask=inside, other=float("-inf")).to(tl.float32)
            found_B = gradient_of_block(x_B, columns, lse_of_row, place, z_loss, smoothing, num_words, Z) * factor
            found_B = tl.where(columns < own_columns, found_B, 0.0)
            tl.store(out + columns, found_B.to(gradient.dtype.element_ty), mask=inside)
            columns += BLOCK
    else:
        nothing_B = tl.zeros((BLOCK,), tl.float32).to(gradient.dtype.element_ty)
        for _ in tl.static_range(BLOCKS):
            tl.store(out + columns, nothing_B, mask=columns < num_columns)
            columns += BLOCK


def parts_of_a_row(num_rows: int, num_columns: int) -> tuple[int, int]:
    """How many programs read a row, and how many columns each: enough programs for the GPU where rows are few and long."""
    blocks = max(1, triton.cdiv(num_columns, READ_BLOCK))
    wanted = 1 if 2 * num_rows >= READ_PROGRAMS else triton.cdiv(READ_PROGRAMS, num_rows)
    blocks_a_part = triton.cdiv(blocks, min(blocks, wanted))
    return triton.cdiv(blocks, blocks_a_part), blocks_a_part * READ_BLOCK


def _read(logits: Tensor, labels: Tensor, words: Words, terms: LossTerms) -> Tensor:
    """Statistics of the parts of each row: [S, 3 or 4, N]."""
    num_rows, num_parts, columns_a_part = len(labels), *parts_of_a_row(len(labels), words.size)
    has_sum = terms.smoothing != 0.0
    parts = logits.new_empty((num_parts, 3 + has_sum, num_rows), dtype=torch.float32)
    _statistics_kernel[(num_rows * num_parts,)](
        logits, labels, parts, logits.stride(0), num_rows, words.size, words.start, terms.ignore_index,
        columns_a_part, num_parts, has_sum, READ_BLOCK, READ_STAGES, num_warps=READ_WARPS,
    )  # fmt: skip
    return parts


def statistics(logits: Tensor, labels: Tensor, words: Words, terms: LossTerms) -> Tensor:
    """The op `vocabulary_statistics` of at least one row, whose columns are neighbours."""
    parts = _read(logits, labels, words, terms)
    num_rows = len(labels)
    merged = torch.empty_like(parts[0])
    _merge_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
        parts, labels, merged, merged, merged, num_rows, len(parts), words.total, terms.ignore_index, 0.0, 0.0,
        False, terms.smoothing != 0.0, False, MERGE_ROWS, num_warps=4,
    )  # fmt: skip
    return merged


def losses(logits: Tensor, labels: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """The loss and logsumexp of each row [N], float32; at least one row, whose columns are neighbours."""
    num_rows, num_columns = logits.shape
    parts = _read(logits, labels, Words(0, num_columns, num_columns), terms)
    found, lse = torch.empty_like(parts[0, 0]), torch.empty_like(parts[0, 0])
    _merge_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
        parts, labels, parts, lse, found, num_rows, len(parts), num_columns, terms.ignore_index,
        terms.z_loss, terms.smoothing,
        True, terms.smoothing != 0.0, terms.z_loss != 0.0, MERGE_ROWS, num_warps=4,
    )  # fmt: skip
    return found, lse


def write_gradient(
    scale: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, words: Words, terms: LossTerms, gradient: Tensor
) -> None:
    """The op `vocabulary_gradient`, into `gradient`, which may be the logits; at least one row."""
    num_rows, num_columns = logits.shape
    num_parts = triton.cdiv(num_columns, WRITE_BLOCK * WRITE_BLOCKS)
    _gradient_kernel[(num_rows * num_parts,)](
        scale, logits, labels, lse, gradient, logits.stride(0), gradient.stride(0), num_columns, words.size,
        words.start, words.total, terms.ignore_index, terms.z_loss, terms.smoothing, num_parts,
        terms.z_loss != 0.0, WRITE_BLOCK, WRITE_BLOCKS, num_warps=WRITE_WARPS,
    )  # fmt: skip


def row_builds(dtype: str) -> tuple[Build, ...]:
    """Statistics and gradients as a Llama's vocabulary launches them, with every term and without."""
    sizes = {"num_rows": "i32", "num_columns": "i32", "num_parts": "i32", "row_stride": "i32", "first": "i32"}
    sizes |= {"ignore_index": "i32", "z_loss": "fp32", "smoothing": "fp32", "num_words": "i32", "own_columns": "i32"}
    sizes |= {"columns_a_part": "i32", "gradient_stride": "i32", "labels": "*i64"}
    floats = dict.fromkeys(("parts", "merged", "lse", "losses", "scale"), "*fp32")
    types = sizes | floats | dict.fromkeys(("logits", "gradient"), f"*{dtype}")
    aligned = ("row_stride", "gradient_stride", "num_columns", "columns_a_part")

    def build(name: str, kernel: Any, warps: int, **constants: Any) -> Build:
        needed = {name: types[name] for name in kernel.arg_names if name in types}
        return Build(f"{name} {dtype}", kernel, needed, constants, warps, READ_STAGES, aligned)

    read = {"BLOCK": READ_BLOCK, "STAGES": READ_STAGES}
    return (
        build("loss statistics", _statistics_kernel, READ_WARPS, SUM=False, **read),
        build("loss statistics, smoothing", _statistics_kernel, READ_WARPS, SUM=True, **read),
        build("loss merge", _merge_kernel, 4, LOSS=True, SUM=True, Z=True, BLOCK=MERGE_ROWS),
        build("loss gradient", _gradient_kernel, WRITE_WARPS, Z=True, BLOCK=WRITE_BLOCK, BLOCKS=WRITE_BLOCKS),
    )
