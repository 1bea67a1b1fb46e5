"""What one launch over many tensors reads first: which tensor each program works on, and where that tensor lies.

Both are made on the host from addresses and sizes alone and sent through pinned memory, so that the host never waits; and both are
remembered by exactly those, per stream, since gradients usually come back to the addresses that they had a step ago.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch

NUMEL, FIRST_PROGRAM, IS_ALIGNED, FIRST_POINTER = range(4)
"""Columns of a row; then pointers."""
NUM_COLUMNS = 10
ALIGNMENT_BYTES = 16


def device_tables(
    pointers: Sequence[tuple[int, ...]], numels: Sequence[int], block: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, int64 [tensors, `NUM_COLUMNS`], and the row of each program, int32 [programs], on the device.

    pointers: of each tensor's lists, 0 where there is none. numels: none of them 0. block: elements a program.
    """
    # A table may be read on the stream on which it was sent.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _rows(tuple(pointers), tuple(numels), block, device, stream), _owners(tuple(numels), block, device, stream)


@lru_cache(maxsize=1024)
def _rows(
    pointers: tuple[tuple[int, ...], ...], numels: tuple[int, ...], block: int, device: torch.device, stream: int
) -> torch.Tensor:
    del stream
    first = [0, *accumulate(-(-numel // block) for numel in numels)]
    rows = []
    for own, numel, start in zip(pointers, numels, first, strict=False):
        is_aligned = int(not any(pointer % ALIGNMENT_BYTES for pointer in own))
        row = [numel, start, is_aligned, *own]
        rows.append(row + [0] * (NUM_COLUMNS - len(row)))
    return _sent(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)


@lru_cache(maxsize=128)  # 4 bytes a program: 131 KB for 2^25 elements
def _owners(numels: tuple[int, ...], block: int, device: torch.device, stream: int) -> torch.Tensor:
    del stream
    programs = torch.tensor([-(-numel // block) for numel in numels], device="cpu")
    owners = torch.arange(len(numels), dtype=torch.int32, device="cpu")
    return _sent(torch.repeat_interleave(owners, programs), device)


def _sent(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return table
    assert not torch.cuda.is_current_stream_capturing(), "a CUDA graph would keep the addresses of this step"
    return table.pin_memory().to(device, non_blocking=True)
