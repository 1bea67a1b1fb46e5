"""Which samples a step holds: the same on any mesh, every sample once an epoch, exact after a resume."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from colossal_core.errors import ConfigError
from colossal_launch.data.loader import BatchShare, DistributedLoader, validation_steps
from colossal_launch.data.permutation import permute


class Numbers:
    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"index": torch.tensor(index)}


class Failing(Numbers):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        raise OSError("the disk is gone")


def _steps(length: int, share: BatchShare, num_steps: int, **options: Any) -> list[list[int]]:
    loader = DistributedLoader(Numbers(length), share, num_steps=num_steps, seed=3, **options)
    return [batch["index"].tolist() for batch in loader]


def _joined(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


@given(length=st.integers(1, 5000), seed=st.integers(0, 2**62), epoch=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_shuffle_is_a_permutation(length: int, seed: int, epoch: int) -> None:
    shuffled = permute(np.arange(length), length, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(shuffled), np.arange(length))


def test_shuffles_are_keyed_and_look_random() -> None:
    places = np.arange(10_000)
    first = permute(places, 10_000, seed=0, epoch=0)
    assert np.array_equal(first, permute(places, 10_000, seed=0, epoch=0))
    for other in (permute(places, 10_000, seed=1, epoch=0), permute(places, 10_000, seed=0, epoch=1)):
        assert int((first == other).sum()) < 12
        assert abs(float(np.corrcoef(first, other)[0, 1])) < 0.05
    assert abs(float(np.corrcoef(first, places)[0, 1])) < 0.05
    assert np.array_equal(permute(places[77:79], 10_000, seed=0, epoch=0), first[77:79])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_ranks_together_hold_what_one_process_holds(size: int, prefetch: bool, shuffle: bool) -> None:
    whole = _steps(25, BatchShare(6), 9, shuffle=shuffle)
    parts = [_steps(25, BatchShare(6, index, size), 9, shuffle=shuffle, prefetch=prefetch) for index in range(size)]
    assert [_joined(step) for step in zip(*parts, strict=True)] == whole


def test_every_sample_comes_once_an_epoch_and_epochs_differ() -> None:
    seen = _joined(_steps(25, BatchShare(10), 10))
    epochs = [seen[start : start + 25] for start in range(0, 100, 25)]
    assert all(sorted(epoch) == list(range(25)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert _joined(_steps(4, BatchShare(6), 2, shuffle=False)) == [0, 1, 2, 3] * 3


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_saved_position_is_exact_on_another_mesh(prefetch: bool) -> None:
    whole = _steps(25, BatchShare(6), 9)
    loader = DistributedLoader(Numbers(25), BatchShare(6, 1, 2), num_steps=9, seed=3, prefetch=prefetch)
    for step, _ in enumerate(loader):
        if step == 3:
            break
    assert (loader.position.step, loader.position.first, loader.position.stop) == (3, 21, 24)
    assert loader.position.indices == tuple(whole[3][3:])
    state = json.loads(json.dumps(loader.state_dict()))
    assert state == {"next_sample": 24, "length": 25, "seed": 3, "shuffle": True}
    rest = []
    for index in range(3):
        other = DistributedLoader(Numbers(25), BatchShare(6, index, 3), num_steps=9, seed=3, prefetch=prefetch)
        other.load_state_dict(state)
        rest.append([batch["index"].tolist() for batch in other])
    assert [_joined(step) for step in zip(*rest, strict=True)] == whole[4:]
    assert [batch["index"].tolist() for batch in loader] == [step[3:] for step in whole[4:]]


def test_the_reading_thread_ends_with_the_iteration() -> None:
    before = threading.active_count()
    batches = iter(DistributedLoader(Numbers(25), BatchShare(5)))
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    with pytest.raises(OSError, match=r"^the disk is gone$"):
        next(iter(DistributedLoader(Failing(3), BatchShare(1))))
    assert threading.active_count() == before


def test_length_epoch_and_own_collation() -> None:
    loader = DistributedLoader(Numbers(8), BatchShare(4), num_steps=3, collate_fn=len)
    assert len(loader) == 3
    assert list(loader) == [4, 4, 4]
    assert loader.epoch == 1.5
    with pytest.raises(TypeError, match=r"^the loader has no end: num_steps was not given$"):
        len(DistributedLoader(Numbers(8), BatchShare(4)))
    assert [validation_steps(100, 32, 16), validation_steps(1000, 32, 16), validation_steps(5, 32, 16)] == [3, 16, 1]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(())


def test_what_cannot_be_read_by_place_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        DistributedLoader(Stream(), BatchShare(1))  # type: ignore[arg-type]
    assert str(caught.value) == (
        "dataset='Stream': needs __len__ and __getitem__: a stream cannot be read from the same place on another mesh: "
        "hand over a data set by index"
    )
    with pytest.raises(ConfigError) as caught:
        DistributedLoader(Numbers(0), BatchShare(1))
    assert str(caught.value) == "dataset: it is empty: hand over a data set with samples"
    with pytest.raises(ConfigError) as caught:
        BatchShare(10, 0, 4)
    assert str(caught.value) == (
        "batch.global_size=10: 4 data-parallel ranks cannot have equal shares of it: use a multiple of 4"
    )
    loader = DistributedLoader(Numbers(8), BatchShare(4), seed=1)
    with pytest.raises(ConfigError) as caught:
        loader.load_state_dict({"next_sample": 4, "length": 9, "seed": 2, "shuffle": True})
    assert str(caught.value) == (
        "dataset=8: the saved position is of length 9: use length 9 again\n"
        "data.seed=1: the saved position is of seed 2: use seed 2 again"
    )
