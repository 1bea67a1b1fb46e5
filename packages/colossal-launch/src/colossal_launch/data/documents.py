"""What a document is, and which documents are held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "all"]

HELD_OUT_ONE_IN = 20
"""One document in this many is held out."""


@dataclass(frozen=True)
class Document:
    """One text and the name by which it can be found again. The text is held as it was decoded: UTF-8, faults replaced."""

    name: str
    text: str


def is_held_out(index: int) -> bool:
    """Whether the row at `index` is held out: the second of every twenty, so that two rows are enough for both parts."""
    return index % HELD_OUT_ONE_IN == 1


def is_name_held_out(name: str) -> bool:
    """Whether a file is held out, by a hash of its name: adding files moves no other file between the parts."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def in_split(held_out: bool, split: Split) -> bool:
    """Whether a document belongs to a split, given whether it is held out."""
    return split == "all" or held_out == (split == "validation")
