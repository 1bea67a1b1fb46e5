"""Tiles of the norms' kernels by width: the one place that a sweep on a GPU changes.

Legend: a tile is `rows` x `block` numbers in the registers of one program; D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class NormConfig:
    """rows, block: of a tile; rows wider than a block are read in chunks of it, more than once. warps: of a program. programs: at most so
    many, each with its own partial sums (backward). stages: of loads under way in a program's loop. twice: a row is read a second time,
    so that registers need not hold it (backward). early: the weight is fetched with the row and waits in registers (forward).
    """

    rows: int
    block: int
    warps: int
    programs: int = 0
    stages: int = 1
    twice: bool = False
    early: bool = False


FORWARD_TILE, FORWARD_PER_WARP = 2048, 512
BACKWARD_TILE, BACKWARD_PER_WARP = 4096, 512
"""Numbers of a tile, and how many of them one warp has."""
CENTRED_TILE = 2048
"""The same of layer norms' backward passes, whose programs are then smaller and twice as many."""
FP8_PER_WARP = 1024
"""The same where numbers leave as eight bits."""
EARLY_COLUMNS = 1 << 10
"""Rows up to this long are short work, in which it is seen when the weight is waited for after the row. Longer ones need the registers."""
FORWARD_ROW_BYTES = 1 << 16
"""A row of at most this size is held in registers; a wider one is read for its statistic and once more, from the cache, for its result."""
BACKWARD_COLUMNS = 1 << 13
"""So many are held in registers in the backward pass, beside as many sums for the weight, or for weight and bias."""
TWICE_COLUMNS, TWICE_WARPS = 1 << 14, 32
"""Of RMS norms so many: the sums for the weight stay in registers, and the row's numbers are read again from the cache."""
CHUNK, WIDE_BLOCK = 2048, 512
"""Columns at a time of a row that is not held, forward and backward."""
PROGRAMS = 264
"""Two for each of an H200's 132 multiprocessors. Fixed, so that sums are taken in the same order on every GPU."""

MOST_SHARED_BYTES = 200 * 1024
"""Of the 227 KiB that a program may have."""


def forward_config(num_columns: int, element_bytes: int, per_warp: int = 0) -> NormConfig:
    """One program for `rows` rows, or for one that it reads in chunks. per_warp: numbers of a warp; 0: `FORWARD_PER_WARP`."""
    if num_columns * element_bytes > FORWARD_ROW_BYTES:
        return NormConfig(rows=1, block=CHUNK, warps=8, stages=3)
    block = triton.next_power_of_2(num_columns)
    rows = max(FORWARD_TILE // max(block, 64), 1)
    warps = min(max(rows * block // (per_warp or FORWARD_PER_WARP), 1), 32)
    return NormConfig(rows, block, warps, early=block <= EARLY_COLUMNS)


def backward_config(num_columns: int, loaded_bytes: int, centred: bool) -> NormConfig:
    """`programs` programs that share the rows among them, `rows` at a time. loaded_bytes: of all tensors for one place of the tile, which
    wait in shared memory. centred: of layer norms.
    """
    if BACKWARD_COLUMNS < num_columns <= TWICE_COLUMNS and not centred:
        block = triton.next_power_of_2(num_columns)
        return NormConfig(1, block, TWICE_WARPS, PROGRAMS // 2, twice=True)
    if num_columns > BACKWARD_COLUMNS:
        rows, block = BACKWARD_TILE // WIDE_BLOCK, WIDE_BLOCK
        parts = max(PROGRAMS // triton.cdiv(num_columns, block), 1)
        return NormConfig(rows, block, 8, parts, _stages(BACKWARD_TILE * loaded_bytes))
    block = triton.next_power_of_2(num_columns)
    tile = CENTRED_TILE if centred else BACKWARD_TILE
    rows = max(tile // max(block, 64), 1)
    warps = min(max(rows * block // BACKWARD_PER_WARP, 1), 16)
    programs = PROGRAMS // 2 if block > BACKWARD_TILE else PROGRAMS
    if centred and block <= CENTRED_TILE:
        programs = 2 * PROGRAMS
    return NormConfig(rows, block, warps, programs, _stages(rows * block * loaded_bytes))


def _stages(stage_bytes: int) -> int:
    """As many as fit, up to three."""
    return min(3, max(MOST_SHARED_BYTES // stage_bytes, 1))
