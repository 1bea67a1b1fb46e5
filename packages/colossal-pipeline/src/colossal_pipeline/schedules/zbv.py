"""ZB-V: two chunks a rank in a V, no idle time for equal costs, in the memory of 1F1B (Qi et al. 2024, arXiv:2401.10241, section 6)."""

from __future__ import annotations

from colossal_core.program import Action, Program
from colossal_pipeline.schedules.closed_form import ClosedForm
from colossal_pipeline.schedules.messages import program_of
from colossal_pipeline.schedules.orders import InTurn, first_microbatches, v_ranks
from colossal_pipeline.stage_costs import StageCosts


def zbv(num_ranks: int, num_chunks: int, num_microbatches: int) -> Program:
    """Rank r holds stages r and 2 p - 1 - r, so that the first rank has the last stage too, and what the first forward passes wait for
    on their way back fills the warm-up. Every rank holds 2 p activations of a microbatch in one of its stages, which are half as large
    as under 1F1B.

    Defined from 2 p microbatches on; for fewer, the last ones are left out.
    """
    assert num_chunks == 2
    orders = [_order(rank, num_ranks, max(num_microbatches, 2 * num_ranks)) for rank in range(num_ranks)]
    return program_of(num_microbatches, v_ranks(num_ranks), first_microbatches(orders, num_microbatches))


def closed_form(num_ranks: int, num_chunks: int, num_microbatches: int, stage: StageCosts) -> ClosedForm | None:
    """With F, I and W those of one chunk: no bubble, and 2 p activations on every rank (paper, section 6). In a step that begins and
    ends at one time on all ranks every rank idles (p - 1) F. Holds for m >= 2 p and F = I = W.
    """
    assert num_chunks == 2
    if num_microbatches < 2 * num_ranks or not stage.forward == stage.backward_input == stage.backward_weight:
        return None
    idle = (num_ranks - 1) * stage.forward
    return ClosedForm(0.0, idle, 6 * num_microbatches * stage.forward, (2 * num_ranks,) * num_ranks)


def _order(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    rest = num_ranks - rank
    turn = InTurn((rank, 2 * num_ranks - 1 - rank))
    turn.add("F0", 2 * rest - 1)
    turn.add("F1 F0", rank)
    turn.add("F1 I1 W1", rest)
    turn.add("F0 I0 W0 F1 I1 W1", num_microbatches - 2 * num_ranks + rank + 1)
    turn.add("I0 W0 F1 I1 W1", rest - 1)
    turn.add("I0 I1", rank)
    turn.add("I0 W0", rest)
    turn.add("W1", rank)
    turn.add("W0", rank)
    return turn.order
