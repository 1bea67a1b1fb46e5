"""DualPipeV: two chunks a rank in a V, forward passes of one chunk beside backward passes of the other, whose messages hide behind them
(DeepSeek-V3, arXiv:2412.19437, section 3.2.1, cut in half: Sea AI Lab, "Cut-in-half", 2025; github.com/deepseek-ai/DualPipe)."""

from __future__ import annotations

from colossal_core.program import Action, Program
from colossal_pipeline.schedules.closed_form import ClosedForm
from colossal_pipeline.schedules.messages import program_of
from colossal_pipeline.schedules.orders import InTurn, first_microbatches, v_ranks
from colossal_pipeline.stage_costs import StageCosts


def dualpipev(num_ranks: int, num_chunks: int, num_microbatches: int) -> Program:
    """Rank r holds stages r and 2 p - 1 - r. Backward passes are whole in the steady state, and in parts where a rank would idle. Every
    rank holds at most 2 p + 1 activations of a microbatch in one of its stages.

    Defined from 2 p microbatches on; for fewer, the last ones are left out.
    """
    assert num_chunks == 2
    orders = [_order(rank, num_ranks, max(num_microbatches, 2 * num_ranks)) for rank in range(num_ranks)]
    return program_of(num_microbatches, v_ranks(num_ranks), first_microbatches(orders, num_microbatches))


def closed_form(num_ranks: int, num_chunks: int, num_microbatches: int, stage: StageCosts) -> ClosedForm | None:
    """With F, I and W those of one chunk: idle (p - 1) (F + I - W), and 2 p + 1 activations on every rank. Holds for m >= 2 p,
    W <= I <= F <= I + W and B = I + W.

    The authors' table has (p - 1) (F&B + B - 3 W), which is (p - 1) I more: there a forward and a backward pass that run side by side
    (F&B) hand on their tensors at the end of both, here the first of the two does when it has ended.
    """
    assert num_chunks == 2
    forward, given, weight = stage.forward, stage.backward_input, stage.backward_weight
    if (
        num_microbatches < 2 * num_ranks
        or not weight <= given <= forward <= given + weight
        or stage.whole_backward != given + weight
    ):
        return None
    idle = (num_ranks - 1) * (forward + given - weight)
    busy = 2 * num_microbatches * (forward + given + weight)
    return ClosedForm(idle, idle, busy, (2 * num_ranks + 1,) * num_ranks)


def _order(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    rest = num_ranks - rank - 1
    turn = InTurn((rank, 2 * num_ranks - 1 - rank))
    turn.add("F0", 2 * rest)
    turn.add("F0 F1", rank + 1)
    turn.add("I1 W1 F1", rest)
    turn.add("F0 B1 F1 B0", num_microbatches - 2 * num_ranks + rank + 1)
    turn.add("B1 F1 B0", rest)
    # The last backward passes of both chunks in turn: the first half of them whole, then in parts.
    for number in range(2 * (rank + 1)):
        turn.add(f"{'B' if number <= rank else 'I'}{1 - number % 2}")
    turn.add("W I0", rest)
    turn.add("W", rank + 1)
    return turn.order
