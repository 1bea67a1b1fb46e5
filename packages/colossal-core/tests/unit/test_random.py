"""Keyed random numbers: known values, uniformity, and that no cut of the batch changes them."""

from __future__ import annotations

import math

import pytest
import torch

from colossal_core.random import (
    RandomKey,
    fold,
    fold_numbers,
    keyed_bits,
    keyed_dropout,
    keyed_uniform,
    seed_fused,
)

CPU = torch.device("cpu")
KEY = RandomKey.of(7, 3, CPU)


def splitmix64(state: int, count: int) -> int:
    """The count-th number of the stream from `state`, counted from 0, in plain integers."""
    mask = (1 << 64) - 1
    z = (state + (count + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_mix_is_the_published_one() -> None:
    # First outputs of the published program for seed 1234567.
    assert [splitmix64(1234567, n) for n in (0, 1)] == [6457827717110365317, 3203168211198807973]
    assert [fold_numbers(n) for n in (0, 1, 17)] == [splitmix64(0, n) for n in (0, 1, 17)]
    assert fold_numbers(5, 9) == splitmix64(0, splitmix64(0, 5) ^ 9)


def test_bits_are_the_hash_of_their_key() -> None:
    sample_ids = torch.tensor([5, 2**40])
    bits = keyed_bits(KEY, sample_ids, (2, 3, 4), 11)
    for row, sample in enumerate(sample_ids.tolist()):
        for position in range(3):
            for feature in range(4):
                expected = fold_numbers(7, 3, 11, sample, position, feature)
                assert int(bits[row, position, feature]) % 2**64 == expected


def test_fold_of_tensors_and_of_numbers_agree() -> None:
    values = (0, 1, -1, 2**62, 123456789)
    for value in values:
        folded = fold(torch.zeros((), dtype=torch.int64), torch.tensor(value))
        assert int(folded) % 2**64 == fold_numbers(value % 2**64)


def test_any_cut_of_samples_positions_and_features_draws_the_same() -> None:
    sample_ids = torch.arange(8) + 16
    whole = keyed_bits(KEY, sample_ids, (8, 6, 10), 1)
    assert torch.equal(torch.cat([keyed_bits(KEY, part, (2, 6, 10), 1) for part in sample_ids.reshape(4, 2)]), whole)
    assert torch.equal(keyed_bits(KEY, sample_ids, (48, 10), 1), whole.reshape(48, 10))
    positions, features = torch.tensor([5, 0, 3]), torch.tensor([9, 2])
    part = keyed_bits(KEY, sample_ids, (8, 3, 2), 1, positions=positions, features=features)
    assert torch.equal(part, whole[:, positions][:, :, features])


def test_every_part_of_the_key_matters() -> None:
    ids = torch.tensor([0, 1])
    base = keyed_bits(KEY, ids, (2, 3, 8), 0)
    for other in (
        keyed_bits(RandomKey.of(8, 3, CPU), ids, (2, 3, 8), 0),
        keyed_bits(RandomKey.of(7, 4, CPU), ids, (2, 3, 8), 0),
        keyed_bits(RandomKey.of(3, 7, CPU), ids, (2, 3, 8), 0),
        keyed_bits(KEY, ids, (2, 3, 8), 1),
        keyed_bits(KEY, ids + 2, (2, 3, 8), 0),
    ):
        assert not bool((other == base).any())
    assert len(set(base.flatten().tolist())) == base.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_numbers_are_uniform(dtype: torch.dtype) -> None:
    u = keyed_uniform(KEY, torch.arange(16), (16, 64, 256), 2, dtype)
    assert u.dtype == dtype
    assert 0.0 <= float(u.min()) < float(u.max()) < 1.0
    count, bins = u.numel(), 64
    observed = torch.histc(u.double(), bins, 0.0, 1.0)
    chi_squared = float(((observed - count / bins) ** 2).sum()) / (count / bins)
    assert abs(chi_squared - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))
    flat = u.double() - 0.5
    for neighbour in (flat.roll(1, 0), flat.roll(1, 1), flat.roll(1, 2)):
        assert abs(float((flat * neighbour).mean()) * 12) < 5 / math.sqrt(count)


def test_dropout_keeps_the_mean_and_its_share() -> None:
    y = keyed_dropout(torch.ones(8, 64, 64, dtype=torch.float64), 0.3, KEY, torch.arange(8), 0)
    kept = y != 0
    assert abs(float(kept.double().mean()) - 0.7) < 5 * math.sqrt(0.21 / y.numel())
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.7))


def test_dropout_of_nothing_and_of_everything() -> None:
    x = torch.rand(2, 3, requires_grad=True)
    assert keyed_dropout(x, 0.0, KEY, torch.arange(2), 0) is x
    y = keyed_dropout(x, 1.0, KEY, torch.arange(2), 0)
    assert torch.equal(y, torch.zeros(2, 3))
    assert y.requires_grad


def test_dropout_does_not_let_what_it_drops_through() -> None:
    x = torch.full((4, 100), math.inf)
    assert not bool(keyed_dropout(x, 0.5, KEY, torch.arange(4), 0).isnan().any())


def test_rows_that_belong_to_no_sample_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError) as caught:
        keyed_bits(KEY, torch.arange(2), (3, 4), 0)
    assert str(caught.value).startswith("dim 0 of (3, 4) is no multiple of 2 samples")


# torch 2.11's own compiler still uses what torch.jit deprecates on Python 3.12.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_numbers_are_the_eager_ones() -> None:
    torch.compiler.reset()
    compiled = torch.compile(keyed_uniform, backend="aot_eager", fullgraph=True)
    ids = torch.arange(4)
    assert torch.equal(compiled(KEY, ids, (4, 3, 5), 1), keyed_uniform(KEY, ids, (4, 3, 5), 1))


def test_fused_draws_repeat_by_the_first_sample() -> None:
    drawn = []
    for key in ((1, 2, 3), (1, 2, 3), (1, 3, 2), (1, 2, 4)):
        seed_fused(*key)
        drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])
