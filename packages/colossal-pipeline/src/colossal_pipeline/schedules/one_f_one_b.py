"""1F1B: after a warm-up, one forward and one backward pass in turn (PipeDream-Flush, Narayanan et al. 2021, arXiv:2006.09503)."""

from __future__ import annotations

from colossal_core.program import Action, Program
from colossal_pipeline.schedules.closed_form import ClosedForm
from colossal_pipeline.schedules.messages import program_of
from colossal_pipeline.schedules.orders import backward, forward, loop_ranks
from colossal_pipeline.stage_costs import StageCosts


def one_f_one_b(num_ranks: int, num_chunks: int, num_microbatches: int) -> Program:
    """One stage a rank. Rank r holds p - r microbatches' activations at most; it idles as long as under GPipe."""
    assert num_chunks == 1
    orders = [_order(rank, num_ranks - rank - 1, num_microbatches) for rank in range(num_ranks)]
    return program_of(num_microbatches, loop_ranks(num_ranks, 1), orders)


def closed_form(num_ranks: int, num_chunks: int, num_microbatches: int, stage: StageCosts) -> ClosedForm:
    """Idle (p - 1) (F + B), the fraction (p - 1) / (m + p - 1); min(m, p - r) activations on rank r. Always holds."""
    assert num_chunks == 1
    idle = (num_ranks - 1) * (stage.forward + stage.whole_backward)
    busy = num_microbatches * (stage.forward + stage.whole_backward)
    return ClosedForm(idle, idle, busy, tuple(min(num_microbatches, num_ranks - rank) for rank in range(num_ranks)))


def _order(rank: int, num_ahead: int, num_microbatches: int) -> list[Action]:
    """num_ahead: by how many microbatches the forward passes run ahead of the backward ones."""
    order: list[Action] = []
    for step in range(num_microbatches + num_ahead):
        if step < num_microbatches:
            order.append(forward(rank, step))
        if step >= num_ahead:
            order.append(backward(rank, step - num_ahead))
    return order
