"""Held-out text: its loss, and bits for each byte of it, which compares across tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from colossal_launch.data.loader import BatchShare, DistributedLoader, validation_steps
from colossal_launch.data.packing import bits_per_byte

if TYPE_CHECKING:
    from colossal_core.trained import Trained
    from colossal_launch.data.packing import TextDataset


@dataclass(frozen=True)
class Evaluation:
    """loss: mean over scored tokens, in nats. bits_per_byte: of the text that they stand for."""

    loss: float
    bits_per_byte: float


def evaluate(trained: Trained, dataset: TextDataset, share: BatchShare, num_batches: int) -> Evaluation:
    """Scores the first global batches of the held-out text, the same ones each time. Waits for the device once."""
    steps = validation_steps(len(dataset), share.global_size, num_batches)
    loader = DistributedLoader(dataset, share, shuffle=False, num_steps=steps, prefetch=False)
    total_nats, total_tokens, num_bytes = 0.0, 0, 0
    for batch in loader:
        result = trained.eval_step(batch)
        first = loader.position.step * share.global_size
        num_bytes += dataset.num_scored_bytes(loader.indices(first, first + share.global_size))
        total_nats += float(result.loss_sum)
        total_tokens += int(result.num_tokens)
    return Evaluation(total_nats / max(total_tokens, 1), bits_per_byte(total_nats, num_bytes))
