"""How far two tensors are apart: the one measure by which the library calls two runs the same. No other tolerance exists."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

EXACT = 1e-12
"""The largest relative difference at which two float64 runs are called the same."""


def relative_difference(a: torch.Tensor, b: torch.Tensor, *, floor: float = 0.0) -> float:
    """`||a - b|| / max(||b||, floor)` in float64, with the Euclidean norm over all elements; b is the one taken for true.

    a, b: full tensors of one shape, any floating dtype. floor: what b's norm is at least taken for (`floor_for_gradients`,
    `floor_for_parameters`), so that a tensor that is zero in theory is not compared with its own rounding. A NaN or an infinity on
    either side gives infinity, never a pass; 0 where both are zero. Synchronises with the host.
    """
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    left, right = (tensor.detach().to("cpu", torch.float64) for tensor in (a, b))
    distance, size = _norm(left - right), max(_norm(right), floor)
    if not (math.isfinite(distance) and math.isfinite(size)):
        return math.inf
    if distance == 0.0:
        return 0.0
    return distance / size if size > 0.0 else math.inf


def floor_for_gradients(tensors: Iterable[torch.Tensor]) -> float:
    """The floor for gradients or for optimizer states: 1e-3 times the norm of all full tensors of that kind together."""
    return 1e-3 * math.hypot(*(_norm(tensor.detach().to("cpu", torch.float64)) for tensor in tensors))


def floor_for_parameters(numel: int) -> float:
    """The floor for one parameter: 1e-3 times the root of its number of elements."""
    return 1e-3 * math.sqrt(numel)


def _norm(tensor: torch.Tensor) -> float:
    """Without overflow or underflow on the way: the largest element is divided out before squares are taken."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(tensor / largest))
