"""A shuffle that can be asked for any place: no table is kept, so position is one number and memory does not grow with the data."""

from __future__ import annotations

import hashlib

import numpy as np

_NUM_ROUNDS = 6
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Every bit of the result depends on every bit of the value and the key (the finaliser of splitmix64, Steele et al. 2014)."""
    mixed = values + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MULTIPLIERS[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MULTIPLIERS[1]
    return mixed ^ (mixed >> np.uint64(31))


def permute(places: np.ndarray, length: int, *, seed: int, epoch: int) -> np.ndarray:
    """Where a shuffle of range(length), keyed on (seed, epoch), sends each place. places: int64 in [0, length).

    A balanced Feistel network (Luby and Rackoff 1988) permutes the next even power of two; a value that falls outside the range is
    sent through again until it falls inside (Black and Rogaway 2002), at most four times as often on average.
    """
    half_bits = max(1, (max(length - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    keys = _round_keys(seed, epoch)
    result = places.astype(np.uint64)
    pending = np.ones(len(result), dtype=bool)
    while pending.any():
        left, right = result[pending] >> shift, result[pending] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        result[pending] = (left << shift) | right
        pending = result >= np.uint64(length)
    return result.astype(np.int64)
