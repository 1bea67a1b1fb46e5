"""Whether the host waits for the device in a step: torch's own check of synchronisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from colossal_core.testing.parity import share_of_step

if TYPE_CHECKING:
    from colossal_core.strategy import ActionRecorder
    from colossal_core.testing.parity import RunSpec
    from colossal_core.trained import Trained


@contextmanager
def never_waits(device: torch.device) -> Iterator[None]:
    """Inside, what makes the host wait for a CUDA device raises RuntimeError. On other devices nothing is watched."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses_without_waiting(
    trained: Trained, spec: RunSpec, num_first: int = 1, recorder: ActionRecorder | None = None
) -> list[float]:
    """The losses of `num_first` steps and of `spec.num_steps` more, in which the host must not wait.

    num_first: steps that make what is made once. recorder: of the last step. Raises: RuntimeError from the place that waits.
    """
    context = trained._engine.context
    rank, device = context.collectives.rank, context.collectives.device
    shares = [share_of_step(spec, trained.plan, rank, step) for step in range(num_first + spec.num_steps)]
    found = [trained.train_step(share).loss for share in shares[:num_first]]
    try:
        with never_waits(device):
            found += [trained.train_step(share).loss for share in shares[num_first:-1]]
            context.recorder = recorder
            found.append(trained.train_step(shares[-1]).loss)
    finally:
        context.recorder = None
    return [float(loss) for loss in found]
