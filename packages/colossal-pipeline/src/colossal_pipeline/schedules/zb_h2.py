"""ZB-H2: no idle time between a rank's first and last action, for almost twice the activations (Qi et al. 2024, arXiv:2401.10241, 2.2)."""

from __future__ import annotations

from colossal_core.program import Program
from colossal_pipeline.schedules.closed_form import ClosedForm
from colossal_pipeline.schedules.messages import program_of
from colossal_pipeline.schedules.orders import loop_ranks
from colossal_pipeline.schedules.zb_h1 import delayed_weights
from colossal_pipeline.stage_costs import StageCosts


def zb_h2(num_ranks: int, num_chunks: int, num_microbatches: int) -> Program:
    """One stage a rank. Rank r runs 2 (p - r) - 1 forward passes first and its weight parts 2 r microbatches late: every rank holds
    2 p - 1 microbatches' activations.
    """
    assert num_chunks == 1
    orders = [
        delayed_weights(rank, 2 * (num_ranks - rank) - 1, 2 * rank, num_microbatches) for rank in range(num_ranks)
    ]
    return program_of(num_microbatches, loop_ranks(num_ranks, 1), orders)


def closed_form(num_ranks: int, num_chunks: int, num_microbatches: int, stage: StageCosts) -> ClosedForm | None:
    """Bubble (p - 1) (F + I - 2 W), nothing for equal costs; 2 p - 1 activations on every rank (paper, table 2). In a step that
    begins and ends at one time on all ranks every rank idles (p - 1) F. Holds for m >= 2 p - 1 and W <= F, W <= I <= 2 W.
    """
    assert num_chunks == 1
    enough = num_microbatches >= 2 * num_ranks - 1
    if not (enough and stage.backward_weight <= min(stage.forward, stage.backward_input)) or (
        stage.backward_input > 2 * stage.backward_weight
    ):
        return None
    bubble = (num_ranks - 1) * (stage.forward + stage.backward_input - 2 * stage.backward_weight)
    busy = num_microbatches * (stage.forward + stage.backward_input + stage.backward_weight)
    return ClosedForm(bubble, (num_ranks - 1) * stage.forward, busy, (2 * num_ranks - 1,) * num_ranks)
