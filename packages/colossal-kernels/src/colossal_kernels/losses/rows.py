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
from colossal_kernels.losses.formulas import (
    LARGEST,
    behind,
    gradient_of_block,
    head_of,
    logarithm,
    loss_of_row,
    sums_of_row,
)

MULTIPROCESSORS = 132
"""Of an H200. Fixed, so that sums are taken in the same order on every GPU."""
READ_BLOCK, READ_WARPS, READ_STAGES = 4096, 4, 4
"""Statistics: columns at a time, warps of a program, loads in flight."""
READ_PROGRAMS = 4 * MULTIPROCESSORS
"""With fewer rows than half of this, several programs share a row."""
WRITE_BLOCK, WRITE_WARPS = 4096, 4
"""Gradient: columns of a program, and its warps."""
MERGE_ROWS = 128
"""Rows of a program that joins parts."""


@triton.jit
def _statistics_kernel(
    logits, labels, parts, lse, losses, row_stride, num_rows, num_columns, first, num_words, ignore_index, z_loss, smoothing,
    columns_a_part, num_parts, LOSS: tl.constexpr, SUM: tl.constexpr, Z: tl.constexpr, WHOLE: tl.constexpr,
    HEADED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """parts [S, 3 or 4, N]: maximum (finite), sum of exponentials relative to it, the label's logit or 0, sum of logits. WHOLE: a row is
    one part, and what `_merge_kernel` would make of it is written at once.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // num_parts
    part = (program % num_parts).to(tl.int32)
    label = tl.load(labels + row).to(tl.int64)
    x = logits + row * row_stride
    head = head_of(x, HEADED)
    x = behind(x, head, HEADED)
    start = part * columns_a_part
    stop = tl.minimum(start + columns_a_part, num_columns - head)
    # The head belongs to the first part.
    place = label - first - head
    if HEADED:
        head = tl.where(part == 0, head, 0)
    begin = start - head
    stop = tl.where(label != ignore_index, stop, begin)
    largest, found, total = sums_of_row(x, head, start, stop, SUM, HEADED, BLOCK, STAGES)
    own = (place >= begin) & (place < stop)
    chosen = tl.load(x + tl.where(own, place, 0), mask=own, other=0.0).to(tl.float32)
    if WHOLE:
        _finish(
            largest, found, chosen, total, label, row, num_rows, parts, lse, losses, num_words, ignore_index, z_loss, smoothing,
            LOSS, SUM, Z,
        )  # fmt: skip
    else:
        out = parts + part.to(tl.int64) * (3 + SUM) * num_rows + row
        tl.store(out, largest)
        out += num_rows
        tl.store(out, found)
        out += num_rows
        tl.store(out, chosen)
        if SUM:
            tl.store(out + num_rows, total)


@triton.jit
def _finish(
    largest, found, chosen, total, label, row, num_rows, merged, lse, losses, num_words, ignore_index, z_loss, smoothing,
    LOSS: tl.constexpr, SUM: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """Writes what is known of whole rows: statistics [3 or 4, N], or (LOSS) logsumexp and loss."""
    inside = row < num_rows
    counts = inside & (label != ignore_index)
    if LOSS:
        lse_of_row = tl.where(counts, logarithm(found) + largest, 0.0)
        loss = loss_of_row(lse_of_row, chosen, total, num_words, z_loss, smoothing, SUM, Z)
        # A label that is no word has no logit, and must not pass for one of zero.
        loss = tl.where((label >= 0) & (label < num_words), loss, float("nan"))
        tl.store(lse + row, lse_of_row, mask=inside)
        tl.store(losses + row, tl.where(counts, loss, 0.0), mask=inside)
    else:
        largest = tl.where(largest >= LARGEST, float("inf"), largest)
        largest = tl.where(largest <= -LARGEST, float("-inf"), largest)
        target = merged + row
        tl.store(target, tl.where(counts, largest, 0.0), mask=inside)
        target += num_rows
        tl.store(target, found, mask=inside)
        target += num_rows
        tl.store(target, chosen, mask=inside)
        if SUM:
            tl.store(target + num_rows, total, mask=inside)


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
    _finish(
        largest_R, sum_R, chosen_R, total_R, label_R, row_R, num_rows, merged, lse, losses, num_words, ignore_index, z_loss,
        smoothing, LOSS, SUM, Z,
    )  # fmt: skip


@triton.jit
def _gradient_kernel(
    scale, logits, labels, lse, gradient, row_stride, gradient_stride, num_columns, own_columns, first, num_words,
    ignore_index, z_loss, smoothing, num_parts, Z: tl.constexpr, HEADED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient may be logits. Columns from own_columns on are padding."""
    program = tl.program_id(0).to(tl.int64)
    row = program // num_parts
    label = tl.load(labels + row).to(tl.int64)
    x = logits + row * row_stride
    out = gradient + row * gradient_stride
    head = head_of(x, HEADED)
    x = behind(x, head, HEADED)
    out = behind(out, head, HEADED)
    stop, own_stop = num_columns - head, own_columns - head
    place = label - first - head
    place = tl.where(place < own_stop, place, num_columns)
    begin = (program % num_parts).to(tl.int32) * BLOCK
    columns = begin + tl.arange(0, BLOCK)
    if label != ignore_index:
        factor = tl.load(scale).to(tl.float32)
        lse_of_row = tl.load(lse + row)
        if begin + BLOCK <= own_stop:
            x_B = tl.load(x + columns).to(tl.float32)
            found_B = gradient_of_block(x_B, columns, lse_of_row, place, z_loss, smoothing, num_words, factor, Z)
            tl.store(out + columns, found_B.to(gradient.dtype.element_ty))
        else:
            _write_some(
                x, out, columns, columns < stop, own_stop, factor, lse_of_row, place, z_loss, smoothing, num_words, Z
            )
        if HEADED and begin == 0:
            column = tl.arange(0, 8) - 8
            inside = (column >= -head) & (column < stop)
            _write_some(x, out, column, inside, own_stop, factor, lse_of_row, place, z_loss, smoothing, num_words, Z)
    else:
        nothing_B = tl.zeros((BLOCK,), tl.float32).to(gradient.dtype.element_ty)
        tl.store(out + columns, nothing_B, mask=columns < stop)
        if HEADED and begin == 0:
            column = tl.arange(0, 8) - 8
            nothing_W = tl.zeros((8,), tl.float32).to(gradient.dtype.element_ty)
            tl.store(out + column, nothing_W, mask=(column >= -head) & (column < stop))


@triton.jit
def _write_some(
    x, out, columns, inside, own_stop, factor, lse_of_row, place, z_loss, smoothing, num_words, Z: tl.constexpr
):
    """The gradient of the columns that are inside; zero from own_stop on."""
    x_B = tl.load(x + columns, mask=inside, other=float("-inf")).to(tl.float32)
    found_B = gradient_of_block(x_B, columns, lse_of_row, place, z_loss, smoothing, num_words, factor, Z)
    found_B = tl.where(columns < own_stop, found_B, 0.0)
    tl.store(out + columns, found_B.to(out.dtype.element_ty), mask=inside)


def has_heads(num_columns: int, *tensors: Tensor) -> bool:
    """Whether columns of these, of which num_columns are used, are to be counted from multiples of 16 bytes: not where a launch sees by
    itself that rows begin and end at such, and not where a row begins at different places between two of them in different tensors.
    """
    item, first = tensors[0].element_size(), tensors[0]
    if num_columns % 16 == 0 and all(t.stride(0) % 16 == 0 == t.data_ptr() % 16 for t in tensors):
        return False
    strides, addresses = ([f(t) - f(first) for t in tensors] for f in (lambda t: t.stride(0) * item, Tensor.data_ptr))
    return not any(difference % 16 for difference in (*strides, *addresses))


def parts_of_a_row(num_rows: int, num_columns: int) -> tuple[int, int]:
    """How many programs read a row, and how many columns each: enough programs for the GPU where rows are few and long."""
    blocks = max(1, triton.cdiv(num_columns, READ_BLOCK))
    wanted = 1 if 2 * num_rows >= READ_PROGRAMS else triton.cdiv(READ_PROGRAMS, num_rows)
    blocks_a_part = triton.cdiv(blocks, min(blocks, wanted))
    return triton.cdiv(blocks, blocks_a_part), blocks_a_part * READ_BLOCK


def statistics(logits: Tensor, labels: Tensor, words: Words, terms: LossTerms) -> Tensor:
    """The op `vocabulary_statistics` of at least one row, whose columns are neighbours."""
    merged = logits.new_empty((3 + (terms.smoothing != 0.0), len(labels)), dtype=torch.float32)
    _read(logits, labels, words, terms, (merged, merged, merged), is_loss=False)
    return merged


def losses(logits: Tensor, labels: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """The loss and logsumexp of each row [N], float32; at least one row, whose columns are neighbours."""
    num_rows, num_columns = logits.shape
    found, lse = (logits.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    _read(logits, labels, Words(0, num_columns, num_columns), terms, (lse, lse, found), is_loss=True)
    return found, lse


def _read(
    logits: Tensor,
    labels: Tensor,
    words: Words,
    terms: LossTerms,
    targets: tuple[Tensor, Tensor, Tensor],
    *,
    is_loss: bool,
) -> None:
    """targets: statistics, logsumexp and losses, of which `is_loss` says which are written."""
    num_rows = len(labels)
    num_parts, columns_a_part = parts_of_a_row(num_rows, words.size)
    has_sum, has_z, whole = terms.smoothing != 0.0, terms.z_loss != 0.0, num_parts == 1
    merged, lse, found = targets
    parts = merged if whole else logits.new_empty((num_parts, 3 + has_sum, num_rows), dtype=torch.float32)
    _statistics_kernel[(num_rows * num_parts,)](
        logits, labels, parts, lse, found, logits.stride(0), num_rows, words.size, words.start, words.total,
        terms.ignore_index, terms.z_loss, terms.smoothing, columns_a_part, num_parts,
        is_loss, has_sum, has_z, whole, has_heads(words.size, logits), READ_BLOCK, READ_STAGES, num_warps=READ_WARPS,
    )  # fmt: skip
    if not whole:
        _merge_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
            parts, labels, merged, lse, found, num_rows, num_parts, words.total, terms.ignore_index,
            terms.z_loss, terms.smoothing, is_loss, has_sum, has_z, MERGE_ROWS, num_warps=4,
        )  # fmt: skip


def write_gradient(
    scale: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, words: Words, terms: LossTerms, gradient: Tensor
) -> None:
    """The op `vocabulary_gradient`, into `gradient`, which may be the logits; at least one row."""
    num_rows, num_columns = logits.shape
    num_parts = triton.cdiv(num_columns, WRITE_BLOCK)
    _gradient_kernel[(num_rows * num_parts,)](
        scale, logits, labels, lse, gradient, logits.stride(0), gradient.stride(0), num_columns, words.size,
        words.start, words.total, terms.ignore_index, terms.z_loss, terms.smoothing, num_parts,
        terms.z_loss != 0.0, has_heads(num_columns, logits, gradient), WRITE_BLOCK, num_warps=WRITE_WARPS,
    )  # fmt: skip


def row_builds(dtype: str) -> tuple[Build, ...]:
    """Statistics and gradients as a Llama's vocabulary launches them, with every term and without."""
    sizes = {"num_rows": "i32", "num_columns": "i32", "num_parts": "i32", "row_stride": "i32", "first": "i32"}
    sizes |= {"ignore_index": "i32", "z_loss": "fp32", "smoothing": "fp32", "num_words": "i32", "own_columns": "i32"}
    sizes |= {"columns_a_part": "i32", "gradient_stride": "i32", "labels": "*i64"}
    floats = dict.fromkeys(("parts", "merged", "lse", "losses", "scale"), "*fp32")
    types = sizes | floats | dict.fromkeys(("logits", "gradient"), f"*{dtype}")
    aligned = ("row_stride", "gradient_stride", "num_columns", "own_columns")

    def build(name: str, kernel: Any, warps: int, **constants: Any) -> Build:
        needed = {name: types[name] for name in kernel.arg_names if name in types}
        strides = () if constants.get("HEADED") else aligned
        return Build(f"{name} {dtype}", kernel, needed, constants, warps, READ_STAGES, ("columns_a_part", *strides))

    read = {"LOSS": True, "WHOLE": True, "BLOCK": READ_BLOCK, "STAGES": READ_STAGES}
    plain, terms = {"SUM": False, "Z": False}, {"SUM": True, "Z": True}
    write = {"Z": True, "BLOCK": WRITE_BLOCK}
    return (
        build("loss statistics", _statistics_kernel, READ_WARPS, HEADED=False, **plain, **read),
        build("loss statistics, all terms", _statistics_kernel, READ_WARPS, HEADED=False, **terms, **read),
        build("loss statistics, any length", _statistics_kernel, READ_WARPS, HEADED=True, **terms, **read),
        build("loss merge", _merge_kernel, 4, LOSS=True, BLOCK=MERGE_ROWS, **terms),
        build("loss gradient", _gradient_kernel, WRITE_WARPS, HEADED=False, **write),
        build("loss gradient, any length", _gradient_kernel, WRITE_WARPS, HEADED=True, **write),
    )
