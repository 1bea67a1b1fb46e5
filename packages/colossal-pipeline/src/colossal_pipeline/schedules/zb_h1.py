"""ZB-H1: 1F1B whose weight gradients wait until a rank would idle (Qi et al. 2024, arXiv:2401.10241, section 2.1)."""

from __future__ import annotations

from colossal_core.program import Action, Program
from colossal_pipeline.schedules.closed_form import ClosedForm
from colossal_pipeline.schedules.messages import program_of
from colossal_pipeline.schedules.orders import backward_input, backward_weight, forward, loop_ranks
from colossal_pipeline.stage_costs import StageCosts


def zb_h1(num_ranks: int, num_chunks: int, num_microbatches: int) -> Program:
    """One stage a rank. Rank r runs p - r forward passes first, as under 1F1B, and its weight parts r microbatches late: every rank
    holds p microbatches' activations, what rank 0 holds under 1F1B.
    """
    assert num_chunks == 1
    orders = [delayed_weights(rank, num_ranks - rank, rank, num_microbatches) for rank in range(num_ranks)]
    return program_of(num_microbatches, loop_ranks(num_ranks, 1), orders)


def closed_form(num_ranks: int, num_chunks: int, num_microbatches: int, stage: StageCosts) -> ClosedForm | None:
    """Bubble (p - 1) (F + I - W); p activations on every rank (paper, table 2). In a step that begins and ends at one time on all ranks
    every rank idles as long, and (p - 1) F at least. Holds for m >= p and W <= F.
    """
    assert num_chunks == 1
    if num_microbatches < num_ranks or stage.backward_weight > stage.forward:
        return None
    bubble = (num_ranks - 1) * (stage.forward + stage.backward_input - stage.backward_weight)
    idle = max(bubble, (num_ranks - 1) * stage.forward)
    busy = num_microbatches * (stage.forward + stage.backward_input + stage.backward_weight)
    return ClosedForm(bubble, idle, busy, (num_ranks,) * num_ranks)


def delayed_weights(stage: int, num_first: int, delay: int, num_microbatches: int) -> list[Action]:
    """The order of one stage. num_first: forward passes before the first backward one. delay: by how many microbatches the weight part
    of a backward pass runs after its input part.
    """
    order = [forward(stage, number) for number in range(min(num_first, num_microbatches))]
    for number in range(num_microbatches):
        order.append(backward_input(stage, number))
        if number >= delay:
            order.append(backward_weight(stage, number - delay))
        if number + num_first < num_microbatches:
            order.append(forward(stage, number + num_first))
    late = range(max(0, num_microbatches - delay), num_microbatches)
    return [*order, *(backward_weight(stage, number) for number in late)]
