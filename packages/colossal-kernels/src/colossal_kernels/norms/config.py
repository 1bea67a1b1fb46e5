"""Tiles of the norms' kernels by width: the one place that a sweep on a GPU changes.

Legend: a tile is `rows` x `block` numbers in the registers of one program; D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class NormConfig:
    """rows, block: of a tile; rows wider than a block are read in chunks of it, more than once. warps: of a program. programs: at most so
    many, each with its own partial sums (backward). stages: of loads under way in a program's loop.
    """

    rows: int
    block: int
    warps: int
    programs: int = 0
    stages: int = 1


FORWARD_TILE = 4096
BACKWARD_TILE = 4096
FORWARD_ROW_BYTES = 1 << 16
"""A row of at most this size is held in registers; a wider one is read for its statistic and once more, from the cache, for its result."""
BACKWARD_COLUMNS = 1 << 13
"""The like in the backward pass, which holds both sums for the weight besides."""
CHUNK = 2048
"""Columns at a time of a row that is not held."""
PROGRAMS = 264
"""Two for each of an H200's 132 multiprocessors. Fixed, so that sums are taken in the same order on every GPU."""

MOST_SHARED_BYTES = 200 * 1024
"""Of the 227 KiB that a program may have."""


def forward_config(num_columns: int, element_bytes: int) -> NormConfig:
    """One program for `rows` rows, or for one that it reads in chunks."""
    if num_columns * element_bytes > FORWARD_ROW_BYTES:
        return NormConfig(rows=1, block=CHUNK, warps=8, stages=3)
    block = triton.next_power_of_2(num_columns)
    rows = max(FORWARD_TILE // max(block, 64), 1)
    return NormConfig(rows, block, warps=min(max(rows * block // 512, 1), 32))


def backward_config(num_rows: int, num_columns: int, loaded_bytes: int) -> NormConfig:
    """`programs` programs that share the rows among them, `rows` at a time. loaded_bytes: of all tensors for one place of the tile, which
    wait in shared memory.
    """
    if num_columns > BACKWARD_COLUMNS:
        rows = 4 if num_rows >= 4 * PROGRAMS else 1
        return NormConfig(rows, CHUNK, 4 * rows, PROGRAMS // 2, _stages(rows * CHUNK * loaded_bytes))
    block = triton.next_power_of_2(num_columns)
    rows = max(BACKWARD_TILE // max(block, 64), 1)
    warps = min(max(rows * block // 512, 1), 16)
    programs = PROGRAMS if block <= BACKWARD_TILE else PROGRAMS // 2
    return NormConfig(rows, block, warps, programs, _stages(rows * block * loaded_bytes))


def _stages(stage_bytes: int) -> int:
    """As many as fit, up to three."""
    return min(3, max(MOST_SHARED_BYTES // stage_bytes, 1))
