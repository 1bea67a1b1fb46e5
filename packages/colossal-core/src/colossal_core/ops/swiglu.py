"""Reference gated activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` with `silu(z) = z * sigmoid(z)` (Shazeer 2020, equation 6, without its matrix products).

    gate, up: the same shape [..., F], any layout; returns that shape.
    """
    return F.silu(gate) * up
