"""GPipe: all forward passes, then all backward passes (Huang et al. 2019, arXiv:1811.06965)."""

from __future__ import annotations

from colossal_core.program import Program
from colossal_pipeline.schedules.closed_form import ClosedForm
from colossal_pipeline.schedules.messages import program_of
from colossal_pipeline.schedules.orders import Orders, backward, forward, loop_ranks
from colossal_pipeline.stage_costs import StageCosts


def gpipe(num_ranks: int, num_chunks: int, num_microbatches: int) -> Program:
    """One stage a rank. Every rank holds the activations of every microbatch. Backward passes run in the order of the forward ones."""
    assert num_chunks == 1
    microbatches = range(num_microbatches)
    orders: Orders = [
        [*(forward(rank, number) for number in microbatches), *(backward(rank, number) for number in microbatches)]
        for rank in range(num_ranks)
    ]
    return program_of(num_microbatches, loop_ranks(num_ranks, 1), orders)


def closed_form(num_ranks: int, num_chunks: int, num_microbatches: int, stage: StageCosts) -> ClosedForm:
    """Idle (p - 1) (F + B), the fraction (p - 1) / (m + p - 1); m activations on every rank. Always holds."""
    assert num_chunks == 1
    idle = (num_ranks - 1) * (stage.forward + stage.whole_backward)
    busy = num_microbatches * (stage.forward + stage.whole_backward)
    return ClosedForm(idle, idle, busy, (num_microbatches,) * num_ranks)
