"""`Trained.verify`: the loss of this mesh beside the one that each rank computes alone from the gathered batch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from colossal_core import batch as batches
from colossal_core.gradients import sum_over_world
from colossal_core.plan import DATA_AXES
from colossal_core.step import lifted
from colossal_core.testing.difference import relative_difference

if TYPE_CHECKING:
    from colossal_core.step import StepEngine


def loss_difference(engine: StepEngine, batch: Mapping[str, torch.Tensor]) -> float:
    """The relative difference between the mesh's loss and the one of the whole batch on this rank, in evaluation mode. Changes nothing.

    It shows that the ranks hold the same model and that the loss is divided by the items of the global batch. Gradients and states
    are compared by `colossal verify`. Where ranks differ along other axes than the data's, both sides run through these axes.

    Communication: one gather of the batch over the data axes, and the loss's all-reduce.
    """
    split = engine.eval_step(batch).loss
    whole = _gathered(engine, batches.to_device(batch, engine.context.device, engine.context.precision.compute))
    micro, size = engine.plan.batch.micro_size, next(iter(whole.values())).shape[0]
    training = engine.model.training
    engine.model.eval()
    try:
        with torch.no_grad(), lifted(engine.context):
            parts = [engine.loss_owner(engine.model, batches.cut(whole, index, micro)) for index in range(-(-size // micro))]
    finally:
        engine.model.train(training)
    total = torch.stack([part.sum.to(torch.float64) for part in parts]).sum()
    items = torch.stack([part.items for part in parts]).sum().clamp(min=1.0)
    worst = torch.tensor(relative_difference(total / items, split), dtype=torch.float64, device=engine.context.device)
    squares = sum_over_world([worst.square()], engine.context.collectives, torch.float64)
    return float(squares[0].sqrt())


def _gathered(engine: StepEngine, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every key's shares in the order of the data ranks."""
    collectives = engine.context.collectives
    size = collectives.size(DATA_AXES)
    whole = {}
    for key, value in batch.items():
        shapes = collectives.gather_bytes(json.dumps(list(value.shape)).encode(), DATA_AXES, tag="verify")
        assert len(set(shapes)) == 1, f"batch.{key}: the ranks hand over different shapes: {[shape.decode() for shape in shapes]}"
        output = torch.empty((size * value.shape[0], *value.shape[1:]), dtype=value.dtype, device=value.device)
        collectives.start_all_gather(output, value.contiguous(), DATA_AXES, tag="verify").wait()
        whole[key] = output
    return whole
