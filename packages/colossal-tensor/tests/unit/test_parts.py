"""Which part of a group each rank holds."""

from __future__ import annotations

import pytest

from colossal_tensor.parts import Parts, even, feature_parts, head_parts, segments, sizes_that_work


def lengths(parts: Parts | None, *, shared: bool = False) -> list[int]:
    assert parts is not None
    ranges = parts.shared_ranges if shared else parts.ranges
    return [stop - start for start, stop in ranges]


def test_ranges_cover_everything_once_and_differ_by_at_most_one() -> None:
    assert even(25, 2) == ((0, 13), (13, 25))
    assert even(4, 3) == ((0, 2), (2, 3), (3, 4))


@pytest.mark.parametrize(
    ("width", "num_ranks", "expected"),
    [(96, 2, [48, 48]), (96, 4, [24, 24, 24, 24]), (11008, 3, [3712, 3648, 3648]), (10, 3, [4, 4, 2]), (7, 2, [4, 3])],
)
def test_features_are_cut_evenly_or_in_multiples_that_suit_a_matrix_product(
    width: int, num_ranks: int, expected: list[int]
) -> None:
    assert lengths(feature_parts(width, num_ranks)) == expected


def test_fewer_features_than_ranks_cannot_be_cut() -> None:
    assert feature_parts(3, 4) is None


@pytest.mark.parametrize(
    ("heads", "shared", "num_ranks", "copies", "own", "held"),
    [
        (32, 8, 4, 1, [2, 2, 2, 2], [2, 2, 2, 2]),
        (25, 25, 2, 1, [13, 12], [13, 12]),
        (12, 3, 2, 1, [2, 1], [2, 1]),
        (8, 2, 4, 2, [1, 1, 1, 1], [1, 1, 1, 1]),
        (8, 1, 8, 8, [1] * 8, [1] * 8),
    ],
)
def test_query_heads_stay_with_the_key_value_head_that_they_share(
    heads: int, shared: int, num_ranks: int, copies: int, own: list[int], held: list[int]
) -> None:
    parts = head_parts(heads, shared, num_ranks)
    assert parts is not None and parts.copies == copies
    assert lengths(parts) == own
    assert lengths(parts, shared=True) == held


def test_each_head_is_held_by_neighbours_where_there_are_more_ranks_than_heads() -> None:
    parts = head_parts(8, 2, 4)
    assert parts is not None
    assert parts.shared_ranges == ((0, 1), (0, 1), (1, 2), (1, 2))
    assert [parts.scaled(8, rank) for rank in range(4)] == [2, 2, 2, 2]
    assert [parts.scaled(2, rank, shared=True) for rank in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize(("heads", "shared", "num_ranks"), [(4, 4, 5), (8, 2, 3), (6, 2, 4), (5, 2, 2)])
def test_what_cannot_be_cut(heads: int, shared: int, num_ranks: int) -> None:
    assert head_parts(heads, shared, num_ranks) is None


def test_the_nearest_sizes_that_work() -> None:
    assert sizes_that_work(lambda size: head_parts(8, 2, size) is not None, 3) == (2, 4)
    assert sizes_that_work(lambda size: head_parts(4, 4, size) is not None, 5) == (4,)


def test_packed_dimensions_are_cut_weight_by_weight() -> None:
    assert list(segments(96, "two", (1, 1))) == [(0, 48), (48, 96)]
    assert list(segments(128, "qkv", (4, 2))) == [(0, 64), (64, 96), (96, 128)]
