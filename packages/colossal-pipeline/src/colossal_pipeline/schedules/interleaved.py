"""Interleaved 1F1B: several chunks a rank shorten the warm-up (Megatron-LM, Narayanan et al. 2021, arXiv:2104.04473, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

from colossal_core.program import Action, Program
from colossal_pipeline.schedules.closed_form import ClosedForm
from colossal_pipeline.schedules.messages import program_of
from colossal_pipeline.schedules.orders import backward, first_microbatches, forward, loop_ranks
from colossal_pipeline.stage_costs import StageCosts


def interleaved(num_ranks: int, num_chunks: int, num_microbatches: int) -> Program:
    """Chunk c of rank r is stage c p + r. Microbatches go through the chunks in groups: all of a group through one chunk, then through
    the next.

    The paper's groups have p microbatches. Where p does not divide their number, the groups are as even as can be and none smaller than
    p, which keeps the idle time and holds more activations. For fewer than p the last microbatches of one group of p are left out.
    """
    assert num_chunks >= 2
    sizes = group_sizes(num_ranks, num_microbatches)
    orders = [_order(rank, num_ranks, num_chunks, sizes) for rank in range(num_ranks)]
    return program_of(num_microbatches, loop_ranks(num_ranks, num_chunks), first_microbatches(orders, num_microbatches))


def closed_form(num_ranks: int, num_chunks: int, num_microbatches: int, stage: StageCosts) -> ClosedForm:
    """With F and B those of one of v chunks: idle (p - 1) (F + B), the fraction (p - 1) / (v m + p - 1); on rank r
    min(v m, 2 (p - r - 1) + (v - 1) g + 1) activations, where g is the size of the largest group, p in the paper.

    For m < p every further chunk waits for p - m microbatches more: idle (p - 1 + (v - 1) (p - m)) (F + B), and of each p activations
    min(m, p) are there.
    """
    one = stage.forward + stage.whole_backward
    idle = (num_ranks - 1 + (num_chunks - 1) * max(0, num_ranks - num_microbatches)) * one
    size = group_sizes(num_ranks, num_microbatches)[0]
    peaks = []
    for rank in range(num_ranks):
        alive = 2 * (num_ranks - rank - 1) + (num_chunks - 1) * size + 1
        if num_microbatches < num_ranks:
            full, rest = divmod(alive, num_ranks)
            alive = full * num_microbatches + min(rest, num_microbatches)
        peaks.append(min(num_chunks * num_microbatches, alive))
    return ClosedForm(idle, idle, num_chunks * num_microbatches * one, tuple(peaks))


def group_sizes(num_ranks: int, num_microbatches: int) -> list[int]:
    """Microbatches of each group: at least `num_ranks`, larger groups first."""
    num_groups = max(1, num_microbatches // num_ranks)
    size, num_larger = divmod(max(num_microbatches, num_ranks), num_groups)
    return [size + (group < num_larger) for group in range(num_groups)]


def _order(rank: int, num_ranks: int, num_chunks: int, sizes: Sequence[int]) -> list[Action]:
    chunks = range(num_chunks)
    forwards = [forward(chunk * num_ranks + rank, number) for chunk, number in _passes(chunks, sizes)]
    backwards = [backward(chunk * num_ranks + rank, number) for chunk, number in _passes(chunks[::-1], sizes)]
    num_ahead = min(len(forwards), 2 * (num_ranks - rank - 1) + (num_chunks - 1) * sizes[0])
    order: list[Action] = []
    for step in range(len(forwards) + num_ahead):
        order += forwards[step : step + 1]
        if step >= num_ahead:
            order.append(backwards[step - num_ahead])
    return order


def _passes(chunks: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Chunk and microbatch of each pass of a rank, in order."""
    passes: list[tuple[int, int]] = []
    first = 0
    for size in sizes:
        passes += [(chunk, number) for chunk in chunks for number in range(first, first + size)]
        first += size
    return passes
