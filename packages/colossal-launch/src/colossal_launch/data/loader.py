"""Which samples a step holds, on any mesh: step k is global samples [kG, (k + 1)G), and a rank's share is one contiguous part of them.

Global sample g is place g mod n of epoch g div n of a data set of n samples; each epoch has its own shuffle. So position is one number,
nothing is dropped at an epoch's end, and a run goes on with another number of ranks at the sample where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset, default_collate

from colossal_core.errors import ConfigError, Problem
from colossal_launch.data.permutation import permute


class MapDataset(Protocol):
    """A data set by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class BatchShare:
    """This rank's part of a global batch. global_size: samples in one step; index, size: the rank's place along the data axes.

    Ranks that differ only in `tp`, `cp` or `pp` have the same share.
    """

    global_size: int
    index: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.size, self
        if self.global_size % self.size:
            reason = f"{self.size} data-parallel ranks cannot have equal shares of it"
            remedy = f"use a multiple of {self.size}"
            raise ConfigError([Problem("batch.global_size", reason, remedy, self.global_size)])

    @property
    def local_size(self) -> int:
        return self.global_size // self.size


@dataclass(frozen=True)
class BatchPosition:
    """Where a batch stands. step: of the loader. first, stop: the global samples of this rank. indices: their places in the data set."""

    step: int
    first: int
    stop: int
    indices: tuple[int, ...]


class DistributedLoader:
    """An iterator over this rank's batches that knows its place. Iterating goes on where the last iteration stopped.

    Ends when `num_steps` batches in all have been given (None: never). State follows the StatefulDataLoader protocol and is the same on
    every rank and every mesh: the batch last given out counts as used, batches read ahead do not. Nothing is communicated.
    """

    def __init__(
        self,
        dataset: MapDataset,
        share: BatchShare,
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_steps: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        prefetch: bool = True,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not callable(getattr(dataset, "__getitem__", None)):
            reason = "needs __len__ and __getitem__: a stream cannot be read from the same place on another mesh"
            raise ConfigError([Problem("dataset", reason, "hand over a data set by index", type(dataset).__name__)])
        self._length = len(dataset)
        if self._length == 0:
            raise ConfigError([Problem("dataset", "it is empty", "hand over a data set with samples")])
        self.dataset = dataset
        self.share = share
        self.num_steps = num_steps
        self._seed = seed
        self._shuffle = shuffle
        self._collate = collate_fn or default_collate
        self._prefetch = prefetch
        self._next_sample = 0
        self._position: BatchPosition | None = None

    def __len__(self) -> int:
        """Batches in all, from the beginning."""
        if self.num_steps is None:
            raise TypeError("the loader has no end: num_steps was not given")
        return self.num_steps

    @property
    def position(self) -> BatchPosition:
        """Where the batch last given out stands."""
        assert self._position is not None, "no batch has been given out yet"
        return self._position

    @property
    def epoch(self) -> float:
        """Passes over the data set so far."""
        return self._next_sample / self._length

    def indices(self, first: int, stop: int) -> tuple[int, ...]:
        """Places in the data set of global samples [first, stop)."""
        samples = np.arange(first, stop, dtype=np.int64)
        places = samples % self._length
        if self._shuffle:
            for epoch in np.unique(samples // self._length):
                chosen = samples // self._length == epoch
                places[chosen] = permute(places[chosen], self._length, seed=self._seed, epoch=int(epoch))
        return tuple(int(place) for place in places)

    def _position_at(self, sample: int) -> BatchPosition:
        first = sample + self.share.index * self.share.local_size
        stop = first + self.share.local_size
        return BatchPosition(sample // self.share.global_size, first, stop, self.indices(first, stop))

    def _read(self, sample: int) -> tuple[BatchPosition, Any]:
        position = self._position_at(sample)
        return position, self._collate([self.dataset[index] for index in position.indices])

    def _has_batch_at(self, sample: int) -> bool:
        return self.num_steps is None or sample // self.share.global_size < self.num_steps

    def __iter__(self) -> Iterator[Any]:
        return self._iterate_ahead() if self._prefetch else self._iterate()

    def _iterate(self) -> Iterator[Any]:
        while self._has_batch_at(self._next_sample):
            yield self._give_out(*self._read(self._next_sample))

    def _iterate_ahead(self) -> Iterator[Any]:
        """One batch is read by a thread while the last is used. The thread ends with the iteration, however that ends."""
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="colossal-data")
        try:
            sample = self._next_sample
            ahead = pool.submit(self._read, sample) if self._has_batch_at(sample) else None
            while ahead is not None:
                position, batch = ahead.result()
                sample += self.share.global_size
                ahead = pool.submit(self._read, sample) if self._has_batch_at(sample) else None
                yield self._give_out(position, batch)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _give_out(self, position: BatchPosition, batch: Any) -> Any:
        self._position = position
        self._next_sample += self.share.global_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position as JSON values, the same on every mesh."""
        return {
            "next_sample": self._next_sample,
            "length": self._length,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position. Raises ConfigError where data set or shuffle are others: the position would mean other samples."""
        reasons = {
            "length": "dataset",
            "seed": "data.seed",
            "shuffle": "shuffle",
        }
        here = self.state_dict()
        problems = [
            Problem(field, f"the saved position is of {key} {state[key]}", f"use {key} {state[key]} again", here[key])
            for key, field in reasons.items()
            if state[key] != here[key]
        ]
        if problems:
            raise ConfigError(problems)
        self._next_sample = int(state["next_sample"])
        self._position = None


def validation_steps(num_samples: int, global_size: int, num_batches: int) -> int:
    """Batches of one evaluation: as asked, fewer where the held-out text is shorter, at least one (which then repeats samples)."""
    return max(1, min(num_batches, num_samples // global_size))
