"""What a batch or a model's outputs cannot be, in one readable message each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.anatomy import ModelAnatomy
from colossal_core.batch import check_share
from colossal_core.errors import ColossalError
from colossal_core.loss import LossOwner
from colossal_core.ops import build_op_table
from colossal_core.plan import BatchPlan
from colossal_core.plugins import discover

PLAN = BatchPlan(global_size=4, share=2, micro_size=2, num_microbatches=1)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "batch: is empty: a batch is a mapping of tensors, the forward's keyword arguments"),
        (
            {"names": ["a", "b"]},
            "batch.names: is a list: every value is a tensor whose first dimension is the sequences; leave out the rest",
        ),
        (
            {"weight": torch.tensor(1.0)},
            "batch.weight: is a 0-d tensor: every value is a tensor whose first dimension is the sequences; leave out the rest",
        ),
        (
            {"input_ids": torch.zeros(3, 2)},
            "batch.input_ids: has 3 sequences, and this rank's share of batch.global_size=4 is 2: take batches from "
            "booster.dataloader, or change batch.global_size",
        ),
    ],
)
def test_batch_that_cannot_be(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ColossalError) as caught:
        check_share(batch, PLAN)
    assert str(caught.value) == message


class Tuples(nn.Module):
    """Returns its logits in a tuple."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (input_ids,)


def test_logits_without_a_name() -> None:
    ops = build_op_table(discover(entry_points=()).ops(), "cpu", "float32")
    owner = LossOwner(ModelAnatomy("Tuples", "causal-lm", (), ()), ops, None)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ColossalError) as caught:
        owner(Tuples(), {"input_ids": ids, "labels": ids})
    assert str(caught.value) == (
        "loss_fn: the model returns tuple without `.logits`, from which the loss is made: let it return them by that name "
        "(transformers: return_dict=True), or pass loss_fn"
    )
