"""Looped breadth-first: each chunk takes all microbatches before the next chunk starts (Lamy-Poirier 2023, arXiv:2211.05953)."""

from __future__ import annotations

from colossal_core.program import Program
from colossal_pipeline.schedules.closed_form import ClosedForm
from colossal_pipeline.schedules.messages import program_of
from colossal_pipeline.schedules.orders import Orders, backward, forward, loop_ranks
from colossal_pipeline.stage_costs import StageCosts


def looped_bfs(num_ranks: int, num_chunks: int, num_microbatches: int) -> Program:
    """Chunk c of rank r is stage c p + r. A chunk's parameters are gathered, and its gradients reduced, for all microbatches in one go;
    in exchange every rank holds the activations of every microbatch.
    """
    assert num_chunks >= 2
    microbatches = range(num_microbatches)
    orders: Orders = []
    for rank in range(num_ranks):
        stages = [chunk * num_ranks + rank for chunk in range(num_chunks)]
        forwards = [forward(stage, number) for stage in stages for number in microbatches]
        backwards = [backward(stage, number) for stage in reversed(stages) for number in microbatches]
        orders.append(forwards + backwards)
    return program_of(num_microbatches, loop_ranks(num_ranks, num_chunks), orders)


def closed_form(num_ranks: int, num_chunks: int, num_microbatches: int, stage: StageCosts) -> ClosedForm:
    """With F and B those of one of v chunks: idle (p - 1) (F + B), the fraction (p - 1) / (v m + p - 1), for m >= p; for fewer every
    further chunk waits for p - m microbatches more: (p - 1 + (v - 1) (p - m)) (F + B). v m activations on every rank.
    """
    one = stage.forward + stage.whole_backward
    idle = (num_ranks - 1 + (num_chunks - 1) * max(0, num_ranks - num_microbatches)) * one
    num_passes = num_chunks * num_microbatches
    return ClosedForm(idle, idle, num_passes * one, (num_passes,) * num_ranks)
