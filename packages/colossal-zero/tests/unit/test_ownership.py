"""Who orthogonalises which matrix: every rank finds the same answer, and the work is shared evenly."""

from __future__ import annotations

import math

import pytest

from colossal_zero.optimizers.newton_schulz import flops
from colossal_zero.optimizers.ownership import bounded_buckets, owners

GPT2_XL = [(1600, 4800), (1600, 1600), (1600, 6400), (6400, 1600)] * 48
ODD = [(7, 5), (100, 3), (40, 40), (41, 39), (2, 2)]


@pytest.mark.parametrize("num_owners", [1, 2, 3, 4, 8])
def test_work_is_shared_evenly(num_owners: int) -> None:
    loads = [0] * num_owners
    for shape, owner in zip(GPT2_XL, owners(GPT2_XL, num_owners), strict=True):
        loads[owner] += flops(shape)
    assert max(loads) <= 1.01 * sum(loads) / num_owners


@pytest.mark.parametrize("num_owners", [1, 2, 3])
def test_buckets_hold_every_matrix_once_and_little_of_each_owner(num_owners: int) -> None:
    elements = 20 * 1600 * 6400
    given = owners(GPT2_XL, num_owners)
    found = list(bounded_buckets(GPT2_XL, num_owners, elements))
    assert sorted(index for bucket in found for index in bucket) == list(range(len(GPT2_XL)))
    for bucket in found:
        sizes = [0] * num_owners
        for index in bucket:
            sizes[given[index]] += math.prod(GPT2_XL[index])
        assert max(sizes) <= elements + 1600 * 6400


def test_a_matrix_larger_than_a_bucket_is_a_bucket() -> None:
    assert list(bounded_buckets(ODD, 2, 1)) == [[2], [3], [1], [0], [4]]
    assert owners(ODD, 2) == [1, 1, 0, 1, 1]


def test_nothing_to_own() -> None:
    assert owners([], 4) == []
    assert list(bounded_buckets([], 4, 10)) == []
