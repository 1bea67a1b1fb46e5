"""The engine of optimizer steps: any number of tensors in one launch, one pass over everything, each element by itself.

A program reads which tensor is its own and where that lies (`tables.py`), widens `BLOCK` elements to float32, applies a rule to them and
rounds once. Bytes an element: gradient g, parameter 2 p, moments 2 s each (8-bit codes 2 + 2 * 4 / 256), copy c; for AdamW, g + 2 p + 4 s
+ c: 28 with bf16 gradients and copies beside float32 (30 with float32 gradients), 20 with bf16 moments, 16.06 with codes, 14 with
everything in bf16 and no copy. The tables add 4 bytes a program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_core.rounding import BLOCK as CODE_ELEMENTS
from colossal_core.rounding import FIRST_MOMENT, SECOND_MOMENT, Code, Coded, Kept
from colossal_kernels.builds import Build
from colossal_kernels.interpreting import interpreted
from colossal_kernels.optimizers import tables
from colossal_kernels.optimizers.lists import Lists
from colossal_kernels.optimizers.narrow_formats import CODE_BLOCK, coded, decoded, draws, to_bf16

CODE_BLOCKS = 4
"""Blocks of 256 elements a program: with `NUM_WARPS`, 4 elements a thread, one access of 16 bytes in float32 and of 8 in bf16. With 8, a
warp's accesses of bf16 and of float32 lie differently, and values go through shared memory."""
NUM_WARPS = 8
FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
STORED = {**FLOATS, torch.int8: tl.int8, torch.uint8: tl.uint8}

_NUMEL = tl.constexpr(tables.NUMEL)
_FIRST_PROGRAM = tl.constexpr(tables.FIRST_PROGRAM)
_IS_ALIGNED = tl.constexpr(tables.IS_ALIGNED)
_COLUMNS = tl.constexpr(tables.NUM_COLUMNS)
_PARAM = tl.constexpr(tables.FIRST_POINTER)
_GRAD = tl.constexpr(tables.FIRST_POINTER + 1)
_FIRST = tl.constexpr(tables.FIRST_POINTER + 2)
_SECOND = tl.constexpr(tables.FIRST_POINTER + 3)
_COPY = tl.constexpr(tables.FIRST_POINTER + 4)
_FIRST_SCALES = tl.constexpr(tables.FIRST_POINTER + 5)
_SECOND_SCALES = tl.constexpr(tables.FIRST_POINTER + 6)


@triton.jit
def _at(row, column, start, places, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the block's elements of the tensor in a column of the row."""
    base = tl.load(row + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + start + places


@triton.jit
def _read(pointers, inside, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside, other=0)


@triton.jit
def _write(pointers, inside, values, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, values.to(pointers.dtype.element_ty))
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _read_moment(pointers, inside, scales, with_scale, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Integers are codes: int8 signed ones, uint8 of positive values."""
    kept = _read(pointers, inside, WHOLE)
    if tl.int8 == DTYPE or tl.uint8 == DTYPE:
        return decoded(kept, tl.load(scales, mask=with_scale, other=0.0), tl.uint8 == DTYPE)
    return kept.to(tl.float32)


@triton.jit
def _write_moment(
    pointers, inside, scales, with_scale, values, seed, blocks,
    DTYPE: tl.constexpr, WHOLE: tl.constexpr, STOCHASTIC: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    if tl.int8 == DTYPE or tl.uint8 == DTYPE:
        values, new_scales = coded(values, draws(seed, blocks, STREAM), tl.uint8 == DTYPE)
        tl.store(scales, new_scales, mask=with_scale)
    else:
        if STOCHASTIC and tl.bfloat16 == DTYPE:
            values = to_bf16(values, draws(seed, blocks, STREAM))
    _write(pointers, inside, values, WHOLE)


@triton.jit
def _update(
    row, block, numel, program, count, clip, seed, n0, n1, n2, n3, n4, n5, n6, n7,
    RULE: tl.constexpr, MOMENTS: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, COPY: tl.constexpr, HAS_CLIP: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    start = block * (ROWS * CODE_BLOCK)
    places = tl.arange(0, ROWS)[:, None] * CODE_BLOCK + tl.arange(0, CODE_BLOCK)[None, :]
    inside = start + places < numel
    blocks = program * ROWS + tl.arange(0, ROWS)
    scale_places = tl.arange(0, ROWS)
    with_scale = start + scale_places * CODE_BLOCK < numel  # a last block that is not whole has one too
    params = _at(row, _PARAM, start, places, PARAM, WHOLE)
    param = _read(params, inside, WHOLE).to(tl.float32)
    grad = _read(_at(row, _GRAD, start, places, GRAD, WHOLE), inside, WHOLE).to(tl.float32)
    if HAS_CLIP:
        grad = grad * tl.load(clip).to(tl.float32)
    first = param
    second = param
    if MOMENTS > 0:
        firsts = _at(row, _FIRST, start, places, FIRST, WHOLE)
        first_scales = _at(row, _FIRST_SCALES, block * ROWS, scale_places, tl.float32, False)
        first = _read_moment(firsts, inside, first_scales, with_scale, FIRST, WHOLE)
    if MOMENTS > 1:
        seconds = _at(row, _SECOND, start, places, SECOND, WHOLE)
        second_scales = _at(row, _SECOND_SCALES, block * ROWS, scale_places, tl.float32, False)
        second = _read_moment(seconds, inside, second_scales, with_scale, SECOND, WHOLE)
    param, first, second = RULE(param, grad, first, second, count, n0, n1, n2, n3, n4, n5, n6, n7)
    if MOMENTS > 0:
        _write_moment(firsts, inside, first_scales, with_scale, first, seed, blocks, FIRST, WHOLE, STOCHASTIC, 1)
    if MOMENTS > 1:
        _write_moment(seconds, inside, second_scales, with_scale, second, seed, blocks, SECOND, WHOLE, STOCHASTIC, 2)
    if STOCHASTIC and tl.bfloat16 == PARAM:
        param = to_bf16(param, draws(seed, blocks, 0))
    param = param.to(PARAM)
    _write(params, inside, param, WHOLE)
    if COPY is not None:
        _write(_at(row, _COPY, start, places, COPY, WHOLE), inside, param.to(tl.float32), WHOLE)


@triton.jit
def _copy(row, block, numel, PARAM: tl.constexpr, COPY: tl.constexpr, ROWS: tl.constexpr):
    start = block * (ROWS * CODE_BLOCK)
    places = tl.arange(0, ROWS)[:, None] * CODE_BLOCK + tl.arange(0, CODE_BLOCK)[None, :]
    inside = start + places < numel
    param = _read(_at(row, _PARAM, start, places, PARAM, False), inside, False).to(tl.float32)
    _write(_at(row, _COPY, start, places, COPY, False), inside, param, False)


@triton.jit
def _update_block(
    row, block, numel, program, step, clip, seed, n0, n1, n2, n3, n4, n5, n6, n7,
    RULE: tl.constexpr, MOMENTS: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, COPY: tl.constexpr, HAS_STEP: tl.constexpr, HAS_CLIP: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    count = 1.0
    if HAS_STEP:
        count = tl.load(step).to(tl.float32)
    is_whole = (tl.load(row + _IS_ALIGNED) != 0) & ((block + 1) * (ROWS * CODE_BLOCK) <= numel)
    if is_whole:
        _update(
            row, block, numel, program, count, clip, seed, n0, n1, n2, n3, n4, n5, n6, n7,
            RULE, MOMENTS, PARAM, GRAD, FIRST, SECOND, COPY, HAS_CLIP, STOCHASTIC, ROWS, True,
        )  # fmt: skip
    else:
        _update(
            row, block, numel, program, count, clip, seed, n0, n1, n2, n3, n4, n5, n6, n7,
            RULE, MOMENTS, PARAM, GRAD, FIRST, SECOND, COPY, HAS_CLIP, STOCHASTIC, ROWS, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["seed"])
def step_kernel(
    rows, owners, step, clip, skip, seed, n0, n1, n2, n3, n4, n5, n6, n7,
    RULE: tl.constexpr, MOMENTS: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, COPY: tl.constexpr, HAS_STEP: tl.constexpr, HAS_CLIP: tl.constexpr, HAS_SKIP: tl.constexpr,
    STOCHASTIC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = rows + tl.load(owners + program).to(tl.int64) * _COLUMNS
    numel = tl.load(row + _NUMEL)
    block = program - tl.load(row + _FIRST_PROGRAM)
    if HAS_SKIP:
        if tl.load(skip).to(tl.int32) == 0:
            _update_block(
                row, block, numel, program, step, clip, seed, n0, n1, n2, n3, n4, n5, n6, n7,
                RULE, MOMENTS, PARAM, GRAD, FIRST, SECOND, COPY, HAS_STEP, HAS_CLIP, STOCHASTIC, ROWS,
            )  # fmt: skip
        else:
            if COPY is not None:
                _copy(row, block, numel, PARAM, COPY, ROWS)
    else:
        _update_block(
            row, block, numel, program, step, clip, seed, n0, n1, n2, n3, n4, n5, n6, n7,
            RULE, MOMENTS, PARAM, GRAD, FIRST, SECOND, COPY, HAS_STEP, HAS_CLIP, STOCHASTIC, ROWS,
        )  # fmt: skip


def step_all(
    operator: Callable[..., None],
    reference: Callable[[Lists], None],
    lists: Lists,
    scalars: Sequence[Tensor | None],
    numbers: Sequence[float],
    seed: int | None,
) -> None:
    """Calls the operator once for the items of each combination of dtypes that it takes, and the reference for the others.

    scalars: as the operator takes them, 0-d. Its arguments are params, grads, each moment, each moment's scales, copies, scalars, numbers
    and seed.
    """
    assert all(len(found) == len(lists.params) for found in (lists.grads, *lists.moments)), "lists of one length"
    groups: dict[tuple[_Kind, ...], list[int]] = {}
    for index, param in enumerate(lists.params):
        if param.numel():
            groups.setdefault(tuple([_kind(kept) for kept in lists.item(index)]), []).append(index)
    left: list[int] = []
    for number, (kinds, indices) in enumerate(groups.items()):
        if not _are_taken(kinds, seed):
            left += indices
            continue
        some = lists.where(indices)
        device = some.params[0].device
        placed = [None if scalar is None else scalar.to(device) for scalar in scalars]
        stored = [[_stored(kept) for kept in moment] for moment in some.moments]
        scales = [[kept.scales for kept in moment if isinstance(kept, Coded)] for moment in some.moments]
        copies = list(some.copies or ())
        own_seed = None if seed is None else seed + number  # each launch counts its blocks from 0
        operator(list(some.params), list(some.grads), *stored, *scales, copies, *placed, numbers, own_seed)
        # An operator of one's own does not count as a change by itself: who saved these for a backward pass is told, as by torch's own.
        torch.autograd.graph.increment_version([*some.params, *chain(*stored, *scales), *copies])
    if left:
        reference(lists.where(sorted(left)))


_Kind = tuple[torch.dtype | Code, torch.device, bool]
"""How a tensor is kept, where, and whether it is contiguous."""


def _stored(kept: Kept) -> Tensor:
    return kept.codes if isinstance(kept, Coded) else kept


def _kind(kept: Kept) -> _Kind:
    if isinstance(kept, Coded):
        return kept.code, kept.codes.device, kept.codes.is_contiguous() and kept.scales.is_contiguous()
    return kept.dtype, kept.device, kept.is_contiguous()


def _are_taken(kinds: Sequence[_Kind], seed: int | None) -> bool:
    device = kinds[0][1]
    codes = () if seed is None else (FIRST_MOMENT, SECOND_MOMENT)
    return (device.type == "cuda" or interpreted()) and all(
        (found in FLOATS or found in codes) and there == device and contiguous for found, there, contiguous in kinds
    )


def launch(
    rule: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    scales: Sequence[Sequence[Tensor]],
    copies: Sequence[Tensor],
    scalars: tuple[Tensor | None, Tensor | None, Tensor | None],
    numbers: Sequence[float],
    seed: int | None,
) -> None:
    """One launch. Items of each list are contiguous, of one dtype, and not empty; scales: for each moment, of its codes, or nothing."""
    columns = [params, grads, *moments, *([()] * (2 - len(moments))), copies, *scales]
    pointers = [tuple(column[index].data_ptr() if column else 0 for column in columns) for index in range(len(params))]
    numels = [param.numel() for param in params]
    device = params[0].device
    rows, owners = tables.device_tables(pointers, numels, CODE_BLOCKS * CODE_ELEMENTS, device)
    step, clip, skip = scalars
    moment_dtypes = [STORED[moment[0].dtype] for moment in moments] + [None] * (2 - len(moments))
    padded = [*numbers, *([0.0] * (8 - len(numbers)))]
    step_kernel[(len(owners),)](
        rows, owners, step, clip, skip, _folded(seed), *padded,
        rule, len(moments), FLOATS[params[0].dtype], FLOATS[grads[0].dtype], *moment_dtypes,
        FLOATS[copies[0].dtype] if copies else None, step is not None, clip is not None, skip is not None,
        seed is not None, CODE_BLOCKS, num_warps=NUM_WARPS,
    )  # fmt: skip


def _folded(seed: int | None) -> int:
    """A seed of 64 bits in 32, as a signed number."""
    if seed is None:
        return 0
    folded = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return folded - (folded >> 31 << 32)


def build(
    name: str, rule: Any, moments: Sequence[Any], *, grad: Any, param: Any = tl.float32, copy: Any = None
) -> Build:
    """What a clipped step with a flag to skip compiles. moments: their dtypes."""
    pointers = {"rows": "*i64", "owners": "*i32", "step": "*fp32", "clip": "*fp32", "skip": "*i1"}
    types = pointers | {"seed": "i32"} | {f"n{index}": "fp32" for index in range(8)}
    padded = [*moments, None, None]
    constants = {"RULE": rule, "MOMENTS": len(moments), "PARAM": param, "GRAD": grad, "COPY": copy}
    constants |= {"FIRST": padded[0], "SECOND": padded[1], "ROWS": CODE_BLOCKS}
    stochastic = any(dtype in (tl.int8, tl.uint8, tl.bfloat16) for dtype in (*moments, param))
    constants |= {"HAS_STEP": True, "HAS_CLIP": True, "HAS_SKIP": True, "STOCHASTIC": stochastic}
    return Build(name, step_kernel, types, constants, NUM_WARPS)
