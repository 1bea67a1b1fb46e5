"""What is trained on: the same sequences in the same step for every contestant, however its ranks are arranged."""

from __future__ import annotations

import torch
from beside_peers.models import Shape
from beside_peers.world import World


class Tokens:
    """Fresh random ids on the device for every step. There is one stream for each rank, of micro_batch sequences a step; ranks that share
    matrices or are stages of one pipeline draw each other's streams too, so that all ranks together train the same whatever the sharing.
    """

    def __init__(
        self, shape: Shape, micro_batch: int, world: World, tensor_size: int = 1, pipeline_size: int = 1
    ) -> None:
        self._size = (micro_batch, shape.sequence_length)
        self._vocab = shape.counted_vocab
        self._device = world.device
        sharing = tensor_size * pipeline_size
        first = world.rank // tensor_size % (world.size // sharing) * sharing  # pipelines are the outermost axis
        self._streams = [_stream(world.device, rank) for rank in range(first, first + sharing)]

    def draw(self) -> torch.Tensor:
        """ids [tensor_size x pipeline_size x micro_batch, T]."""
        parts = [
            torch.randint(0, self._vocab, self._size, generator=stream, device=self._device) for stream in self._streams
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _stream(device: torch.device, rank: int) -> torch.Generator:
    generator = torch.Generator(device)
    generator.manual_seed(1000 + rank)
    return generator
