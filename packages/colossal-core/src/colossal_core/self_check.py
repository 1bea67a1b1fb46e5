"""`Trained.verify`: the loss of this mesh beside the one that each rank computes alone from the gathered batch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from colossal_core.difference import relative_difference
from colossal_core.mesh import DATA_AXES, WORLD
from colossal_core.modules import evaluation_mode

if TYPE_CHECKING:
    from colossal_core.step import StepEngine


def loss_difference(engine: StepEngine, batch: Mapping[str, torch.Tensor]) -> float:
    """The relative difference between the mesh's loss and the one of the whole batch on this rank, in evaluation mode. Changes nothing.

    It shows that the ranks hold the same model and that the loss is divided by the items of the global batch. Gradients and states
    are compared by `colossal verify`. Where ranks differ along other axes than the data's, both sides run through these axes.

    Communication: one gather of the batch over the data axes, and the loss's all-reduces.
    """
    split = engine.eval_step(batch).loss
    with evaluation_mode(engine.model):
        parts = engine.runner.evaluate(engine._on_device(_gathered(engine, batch)))
    device, collectives = engine.context.device, engine.context.collectives
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for part in parts:
        sums += torch.stack([part.sum.to(device, torch.float64), part.items.to(device, torch.float64)])
    for axis in ("cp", "pp"):  # along which the loss of one batch is a sum; the ranks of `tp` each have all of it
        if collectives.size(axis) > 1:
            collectives.start_all_reduce(sums, axis, tag="verify").wait()
    worst = torch.tensor(
        relative_difference(sums[0] / sums[1].clamp(min=1.0), split), dtype=torch.float64, device=device
    )
    collectives.start_all_reduce(worst, WORLD, op="max", tag="verify").wait()
    return float(worst)


def _gathered(engine: StepEngine, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every key's shares in the order of the data ranks."""
    collectives = engine.context.collectives
    size = collectives.size(DATA_AXES)
    whole = {}
    for key, given in batch.items():
        value = given.to(engine.context.device)
        shapes = collectives.gather_bytes(json.dumps(list(value.shape)).encode(), DATA_AXES, tag="verify")
        assert len(set(shapes)) == 1, (
            f"batch.{key}: the ranks hand over different shapes: {[shape.decode() for shape in shapes]}"
        )
        output = torch.empty((size * value.shape[0], *value.shape[1:]), dtype=value.dtype, device=value.device)
        collectives.start_all_gather(output, value.contiguous(), DATA_AXES, tag="verify").wait()
        whole[key] = output
    return whole
