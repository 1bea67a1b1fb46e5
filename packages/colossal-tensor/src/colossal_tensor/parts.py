"""Which part of a group each tensor rank holds: ranges of units, as pure numbers.

Units are dealt in consecutive ranges that differ by at most one, so 25 heads over 2 ranks are 13 and 12: nothing is padded. Where there are
more ranks than key/value heads, every such head is held by the same number of ranks, next to one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from colossal_tensor.group import Group

Range = tuple[int, int]
Numbers = Mapping[tuple[str, str], int]
"""Integer attributes of the model's modules, by (module, attribute)."""

_CHUNKS = (64, 32, 16, 8, 4, 2)
"""Widths of which a rank's part is a multiple where the ranks do not divide evenly: what a matrix product on a GPU likes, first."""
MOST_RANKS = 128
"""How far the search for a size that works goes."""


@dataclass(frozen=True)
class Parts:
    """How the dimensions of one group are cut over `num_ranks`. whole: units of a dimension; ranges: each rank's. copies: how many ranks
    hold the same key/value head; shared_whole, shared_ranges: the units of dimensions made of such heads.
    """

    whole: int
    ranges: tuple[Range, ...]
    copies: int
    shared_whole: int
    shared_ranges: tuple[Range, ...]

    def of(self, rank: int, *, shared: bool = False) -> tuple[Range, int]:
        """A rank's range, and of how many units."""
        return (self.shared_ranges[rank], self.shared_whole) if shared else (self.ranges[rank], self.whole)

    def scaled(self, number: int, rank: int, *, shared: bool = False) -> int:
        """What is left of a number that counts units, or multiples or equal parts of them."""
        (start, stop), whole = self.of(rank, shared=shared)
        total, rest = divmod(number * (stop - start), whole)
        assert rest == 0, f"{number} is not cut by {stop - start} of {whole} units"
        return total


def even(total: int, num_ranks: int) -> tuple[Range, ...]:
    """[0, total) in consecutive ranges, the first ones longer by one where it does not divide."""
    size, rest = divmod(total, num_ranks)
    starts = [rank * size + min(rank, rest) for rank in range(num_ranks + 1)]
    return tuple((starts[rank], starts[rank + 1]) for rank in range(num_ranks))


def feature_parts(width: int, num_ranks: int) -> Parts | None:
    """A width of single features over the ranks; None where there are fewer features than ranks."""
    if width < num_ranks:
        return None
    chunk = 1
    if width % num_ranks:
        chunk = next((size for size in _CHUNKS if width % size == 0 and width // size >= num_ranks), 1)
    ranges = tuple((start * chunk, stop * chunk) for start, stop in even(width // chunk, num_ranks))
    return Parts(width, ranges, 1, width, ranges)


def head_parts(heads: int, key_value_heads: int, num_ranks: int) -> Parts | None:
    """Heads over the ranks, query heads always together with the key/value head that they share; None where that is impossible."""
    if heads % key_value_heads:
        return None
    if num_ranks <= key_value_heads:
        ranges = even(key_value_heads, num_ranks)
        return Parts(key_value_heads, ranges, 1, key_value_heads, ranges)
    copies, rest = divmod(num_ranks, key_value_heads)
    if rest or (heads // key_value_heads) % copies:
        return None
    shared = tuple((rank // copies, rank // copies + 1) for rank in range(num_ranks))
    return Parts(num_ranks, even(num_ranks, num_ranks), copies, key_value_heads, shared)


def parts_of(group: Group, numbers: Numbers, widths: Mapping[str, int], num_ranks: int) -> Parts | None:
    """The parts of a group that stands in a model. numbers: of its modules; widths: of every cut dimension, one packed weight's, by
    parameter. None where it cannot be cut into so many.
    """
    if group.units.kind == "features":
        return feature_parts(min(widths.values()), num_ranks)
    heads = _number(group.units.heads, numbers)
    if heads is None:
        return None
    shared = heads if group.units.key_value_heads is None else _number(group.units.key_value_heads, numbers)
    if shared is None:
        return None
    found = head_parts(heads, shared, num_ranks)
    if found is not None and found.copies > 1 and any(cut.packing == "qkv" for cut in group.cuts):
        return None  # one tensor of which a part is copied and the rest is not
    return found


def _number(where: tuple[str, str] | None, numbers: Numbers) -> int | None:
    return None if where is None else numbers.get(where)


def sizes_that_work(works: Callable[[int], bool], wanted: int) -> tuple[int, ...]:
    """The nearest size below and the nearest above that can be had; fewer where there are none."""
    below = next((size for size in range(wanted - 1, 0, -1) if works(size)), None)
    above = next((size for size in range(wanted + 1, MOST_RANKS + 1) if works(size)), None)
    return tuple(size for size in (below, above) if size is not None)


def segments(size: int, packing: str, heads: tuple[int, int]) -> Iterator[Range]:
    """The [start, stop) of each weight along a dimension of `size`. heads: numbers of query and of key/value heads, for `qkv`."""
    query, shared = heads
    shares = {"whole": (1,), "two": (1, 1), "three": (1, 1, 1), "qkv": (query, shared, shared)}[packing]
    unit, rest = divmod(size, sum(shares))
    assert rest == 0, f"{size} does not hold {packing}"
    start = 0
    for share in shares:
        yield start, start + share * unit
        start += share * unit
